"""Trains the reranker of a run: after its first stage, on stored features.

Each epoch draws one caption of every training video, and finds the wrong videos and captions that
the first stage takes for the most similar ones. The loss is the mean of the cross-entropies of both
directions, of the right candidate among some of these. The epoch that is best on *val* is kept; the
first stage alone is what it has to beat.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from drl_jax.config import Config
from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.data.splits import Split
from drl_jax.evaluation.evaluator import Evaluator, check_split
from drl_jax.evaluation.metrics import summary
from drl_jax.evaluation.reranking import Change, PairScorer, rerank_evaluation
from drl_jax.models.drl import Params
from drl_jax.models.interactions import Features
from drl_jax.models.reranker import (
    RerankerConfig,
    first_stage_sha256,
    init_reranker,
    reranker_definition,
)
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.runs.reranker_file import (
    RERANKER_FILE,
    read_tensors,
    save_reranker,
    write_tensors,
)
from drl_jax.runs.run_params import restore_params
from drl_jax.runs.stored_features import stored_features
from drl_jax.runs.workdir import exclusive
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.sharding import Layout, make_layout

# Pairs of a batch, and negatives of each text and each video.
_BATCH, _NEGATIVES = 32, 7
# Pairs among which negatives are found, about as many as a gallery has. Among many more, the most
# similar captions say the same, and their videos are no negatives.
_POOL = 512
_WARMUP, _DECAY, _MAX_NORM = 0.1, 0.02, 1.0


@dataclasses.dataclass(frozen=True)
class RerankSettings:
    """What a training of a reranker depends on beside its run.

    Attributes:
      candidates: of each query on val that are ranked again, to choose the epoch.
    """

    candidates: int = 20
    epochs: int = 5
    seed: int = 0
    lr: float = 1e-3


def train_reranker(
    workdir: Path,
    config: Config,
    settings: RerankSettings,
    *,
    features: str = "",
    target: Path | None = None,
    change: Change | None = None,
) -> dict[str, Any]:
    """Trains a reranker of the best checkpoint of a run, and writes `reranker.safetensors`.

    A training that was killed continues after its last epoch, and ends with the same file.

    Args:
      features: directory of the stored features; empty: that of the run.
      target: the file to write; None: in the run.
      change: of what the reranker reads, for a study.

    Returns:
      What the file says of the training.

    Raises:
      UserError: no such run or dataset, a first stage without words and frames, too few videos,
        features of something else, or a file of another training.
    """
    target, layout = target or workdir / RERANKER_FILE, make_layout()
    sizes = RerankerConfig.of(config.model, config.data.max_words, config.data.max_frames)
    if not (features := features or config.data.features):
        raise UserError("--features=DIR is missing: where the features of the towers are stored")
    step, params = restore_params(workdir, config.model, layout, "best")
    data = dataclasses.replace(config.data, features=str(features))
    config = dataclasses.replace(config, data=data)
    dataset = VideoDataset(dataset_dir(config))
    splits = [load_split(dataset, name, config.data) for name in ("train", "val", "test")]
    train, val, _ = splits
    if settings.candidates >= len(train.videos):
        raise UserError(
            f"--candidates={settings.candidates}: train has {len(train.videos)} videos, and needs"
            " more than that"
        )
    check_split("val", val, dataset, load_tokenizer(config.model), config.data.max_words)
    with exclusive(workdir):
        stored = stored_features(config, dataset, splits, params, layout)
        evaluator = Evaluator(config, dataset, layout, stored)
        identity = {"first_stage": first_stage_sha256(params), "step": step}
        identity |= dataclasses.asdict(settings)
        if target.exists():
            _, found = read_tensors(target)
            _check_same(target, found, identity)
            return found
        videos = evaluator.encode_videos(params, train.videos)
        # As an index has them, which the first stage compares.
        videos["frame_unit"] = videos["frame_unit"].astype(jnp.bfloat16).astype(np.float32)
        evaluation = evaluator.run(params, val)
        count = min(settings.candidates, len(val.videos))
        scorer = PairScorer(sizes, config.model.dtype, layout, change)
        tx = _optimizer(settings, settings.epochs * _steps(len(train.videos)))
        step_function = make_step(sizes, config.model.dtype, tx, layout)
        best = jax.device_get(
            init_reranker(sizes, config.model, params, jax.random.key(settings.seed))
        )
        state = (best, tx.init(best))
        history, losses = [float(evaluation.metrics["t2v"]["R@1"])], []
        # A variant of a study need not beat the first stage.
        floor = history[0] if change is None else -1.0
        unfinished = target.with_name(f"{target.stem}_state.safetensors")
        if unfinished.exists():
            tensors, found = read_tensors(unfinished)
            _check_same(unfinished, found, identity)
            tree = jax.tree.structure((state, best))
            state, best = tree.unflatten(tensors[str(n)] for n in range(len(tensors)))
            history, losses = found["val_t2v_R1"], found["losses"]
            print(f"resuming {unfinished} after epoch {len(losses)}")
        state = jax.device_put(state, layout.replicated)
        for epoch in range(len(history), settings.epochs + 1):
            batches = _batches(evaluator, params, train, videos, scorer, settings, epoch)
            of_steps = []
            shown = tqdm(batches, f"epoch {epoch}", _steps(len(train.videos)), leave=False)
            for batch in shown:
                *state, loss = step_function(*state, layout.put_batch(batch))
                of_steps.append(loss)
            score = functools.partial(scorer.scores, state[0])
            ranks = rerank_evaluation(score, evaluation, count).ranks
            value = summary(ranks.t2v)["R@1"]
            if value > max(floor, *history[1:], -1.0):
                best = jax.device_get(state[0])
            history.append(value)
            losses.append(float(np.mean(jax.device_get(of_steps))))
            print(
                f"epoch {epoch} of {settings.epochs}: loss {losses[-1]:.4f}, val t2v R@1"
                f" {value:.1f} of {count} candidates (first stage {history[0]:.1f})",
                flush=True,
            )
            about = {**identity, "val_t2v_R1": history, "losses": losses}
            leaves = enumerate(jax.tree.leaves((tuple(state), best)))
            write_tensors(unfinished, {str(n): np.asarray(x) for n, x in leaves}, about)
        about["epoch"] = int(np.argmax([floor, *history[1:]]))
        save_reranker(target, sizes, best, about)
        unfinished.unlink(missing_ok=True)
    return about


def _optimizer(settings: RerankSettings, steps: int) -> optax.GradientTransformation:
    warmup = int(_WARMUP * steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.lr, warmup, steps)
    clip = optax.clip_by_global_norm(_MAX_NORM)
    return optax.chain(clip, optax.adamw(schedule, weight_decay=_DECAY))


def make_step(
    sizes: RerankerConfig, dtype: str, tx: optax.GradientTransformation, layout: Layout
) -> Any:
    """The compiled update: parameters, state of the optimiser, batch -> both anew, and the loss.

    A batch has `pair_arrays` [G, C, ...], of which the first of each group is the right one, and
    `valid` bool [G, C].
    """
    definition, _ = reranker_definition(sizes, dtype)

    def loss_of(params, batch):
        reranker = nnx.merge(definition, params)
        logits = jnp.exp(reranker.logit_scale[...]) * batch["score"] + reranker(batch)
        logits = jnp.where(batch["valid"], logits, -jnp.inf)
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    def step(params, opt_state, batch):
        loss, gradient = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    replicated = layout.replicated
    return jax.jit(
        layout.on_mesh(step, dtype),
        in_shardings=(replicated, replicated, layout.batch_sharded),
        out_shardings=replicated,
        donate_argnums=(0, 1),
    )


def _steps(videos: int) -> int:
    """Batches of an epoch."""
    pools = np.array_split(np.arange(videos), -(-videos // _POOL))
    return sum(max(1, len(pool) // _BATCH) for pool in pools)


def _batches(
    evaluator: Evaluator,
    params: Params,
    train: Split,
    videos: Features,
    scorer: PairScorer,
    settings: RerankSettings,
    epoch: int,
) -> Iterator[Features]:
    """The batches of an epoch, which follow from the seed and its number."""
    rng, offsets = np.random.default_rng([settings.seed, epoch]), train.captions.offsets
    drawn = offsets[:-1] + (rng.random(len(train.captions)) * np.diff(offsets)).astype(int)
    for pool in np.array_split(rng.permutation(len(drawn)), -(-len(drawn) // _POOL)):
        captions = [train.captions.caption(pair) for pair in drawn[pool].tolist()]
        text = evaluator.encode_captions(params, captions)
        video = {name: array[pool] for name, array in videos.items()}
        sim = evaluator.embedder.similarity(params, text, video)
        # Another video with the same caption is right, too.
        same = np.unique(captions, return_inverse=True)[1]
        is_right = same[:, None] == same
        most = min(_NEGATIVES, len(pool) - 1)
        wrong = [hardest(matrix, is_right, most) for matrix in (sim, sim.T)]
        # Few pairs are repeated: every batch has one shape.
        order = np.resize(np.arange(len(pool)), max(_BATCH, len(pool) // _BATCH * _BATCH))
        for own in order.reshape(-1, _BATCH):
            columns, rows = (np.column_stack([own, found[own]]) for found in wrong)
            own = np.broadcast_to(own[:, None], rows.shape)
            rows, columns = np.concatenate([own, rows]), np.concatenate([columns, own])
            valid = ~is_right[rows, columns]
            valid[:, 0] = True
            yield {**scorer.pairs(text, video, rows, columns, sim[rows, columns]), "valid": valid}


def hardest(sim: np.ndarray, is_right: np.ndarray, count: int) -> np.ndarray:
    """The most similar wrong columns of each row, the right ones last: int [N, count]."""
    sim = np.where(is_right, -np.inf, sim)
    return np.argsort(-sim, axis=1, kind="stable")[:, :count]


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{path} is of another training: {name} {found.get(name)}, not {value}; move it"
                " away to train anew"
            )
