"""Trains the reranker of a run: after its first stage, on stored features.

Each epoch draws one caption of every training video, and finds the wrong videos and captions that
the first stage takes for the most similar ones. The loss is the mean of the cross-entropies of both
directions, of the right candidate among some of these. The epoch that is best on *val* is kept; the
first stage alone is what it has to beat.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from drl_jax.config import Config
from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.data.splits import Split
from drl_jax.evaluation.evaluator import Evaluator, check_split
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
from drl_jax.runs.run_params import restore_params
from drl_jax.runs.stored_features import stored_features
from drl_jax.runs.workdir import exclusive
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.sharding import Layout, make_layout
from drl_jax.weights.reranker_file import (
    RERANKER_FILE,
    read_tensors,
    save_reranker,
    write_tensors,
)

# Pairs of a batch, and negatives of each text and each video.
_BATCH, _NEGATIVES = 32, 7
# Pairs among which negatives are found: their similarities fit in memory.
_POOL = 8192
_WARMUP, _DECAY, _MAX_NORM = 0.1, 0.02, 1.0


@dataclasses.dataclass(frozen=True)
class RerankSettings:
    """What a training of a reranker depends on beside its run.

    Attributes:
      candidates: negatives are drawn among so many, and as many are ranked again on val.
    """

    candidates: int = 20
    epochs: int = 5
    seed: int = 0
    lr: float = 3e-4


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
        first_stage = first_stage_sha256(params)
        identity = {"first_stage": first_stage, "step": step, **dataclasses.asdict(settings)}
        if target.exists():
            _, found = read_tensors(target)
            _check_same(target, found, identity)
            return found
        examples = _Examples(evaluator, params, train, settings)
        evaluation = evaluator.run(params, val)
        count = min(settings.candidates, len(val.videos))
        scorer = PairScorer(sizes, config.model.dtype, layout, change)

        def recall(reranker: Params) -> float:
            def score(*pairs: Any) -> np.ndarray:
                return scorer.scores(reranker, *pairs)

            return float((rerank_evaluation(score, evaluation, count).ranks.t2v <= 1).mean() * 100)

        total = settings.epochs * examples.steps
        warmup = int(_WARMUP * total)
        schedule = optax.warmup_cosine_decay_schedule(0.0, settings.lr, warmup, max(total, 1))
        tx = optax.chain(
            optax.clip_by_global_norm(_MAX_NORM), optax.adamw(schedule, weight_decay=_DECAY)
        )
        step_function = make_step(sizes, config.model.dtype, tx, layout)
        reranker = init_reranker(sizes, config.model, params, jax.random.key(settings.seed))
        state = jax.device_put((reranker, tx.init(reranker)), layout.replicated)
        best, losses = jax.device_get(reranker), []
        history = [float(evaluation.metrics["t2v"]["R@1"])]
        resumed = target.with_name(f"{target.stem}_state.safetensors")
        if resumed.exists():
            tensors, found = read_tensors(resumed)
            _check_same(resumed, found, identity)
            state, best = _restored(tensors, state, best, layout)
            history, losses = found["val_t2v_R1"], found["losses"]
            print(f"resuming {resumed} after epoch {len(history) - 1}")
        for epoch in range(len(history), settings.epochs + 1):
            of_steps = []
            for batch in tqdm(
                examples.epoch(epoch, scorer), f"epoch {epoch}", examples.steps, leave=False
            ):
                *state, loss = step_function(*state, layout.put_batch(batch))
                of_steps.append(loss)
            losses.append(float(np.mean(jax.device_get(of_steps))))
            value = recall(state[0])
            if value > max(history):
                best = jax.device_get(state[0])
            history.append(value)
            print(
                f"epoch {epoch} of {settings.epochs}: loss {losses[-1]:.4f},"
                f" val t2v R@1 {value:.1f} of {count} candidates (first stage {history[0]:.1f})",
                flush=True,
            )
            about = {**identity, "val_t2v_R1": history, "losses": losses}
            write_tensors(resumed, _tensors(state, best), about)
        about["epoch"] = int(np.argmax(history))
        save_reranker(target, sizes, best, about)
        resumed.unlink(missing_ok=True)
    return about


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


class _Examples:
    """The batches of each epoch, which follow from the seed and its number."""

    def __init__(
        self, evaluator: Evaluator, params: Params, train: Split, settings: RerankSettings
    ):
        self._evaluator, self._params, self._captions = evaluator, params, train.captions
        self._settings = settings
        self._video = _as_stored(evaluator.encode_videos(params, train.videos))
        self._pools = -(-len(train.videos) // _POOL)
        sizes = [len(part) for part in np.array_split(train.videos, self._pools)]
        self.steps = sum(max(1, size // _BATCH) for size in sizes)

    def epoch(self, epoch: int, scorer: PairScorer) -> Iterator[Features]:
        rng = np.random.default_rng([self._settings.seed, epoch])
        offsets = self._captions.offsets
        drawn = offsets[:-1] + (rng.random(len(self._captions)) * np.diff(offsets)).astype(int)
        for pool in np.array_split(rng.permutation(len(drawn)), self._pools):
            captions = [self._captions.caption(pair) for pair in drawn[pool].tolist()]
            text = self._evaluator.encode_captions(self._params, captions)
            video = {name: array[pool] for name, array in self._video.items()}
            sim = self._evaluator.embedder.similarity(self._params, text, video)
            # Another video with the same caption is right, too.
            same = np.unique(captions, return_inverse=True)[1]
            is_right = same[:, None] == same
            most = min(self._settings.candidates, len(pool) - 1)
            wrong = [
                rng.permuted(hardest(matrix, is_right, most), axis=1)[:, :_NEGATIVES]
                for matrix in (sim, sim.T)
            ]
            # Few pairs are repeated: every batch has one shape.
            order = np.resize(np.arange(len(pool)), max(_BATCH, len(pool) // _BATCH * _BATCH))
            for own in order.reshape(-1, _BATCH):
                videos, texts = (np.column_stack([own, found[own]]) for found in wrong)
                own = np.broadcast_to(own[:, None], videos.shape)
                rows, columns = np.concatenate([own, texts]), np.concatenate([videos, own])
                batch = scorer.pairs(text, video, rows, columns, sim[rows, columns])
                valid = ~is_right[rows, columns]
                valid[:, 0] = True
                yield {**batch, "valid": valid}


def hardest(sim: np.ndarray, is_right: np.ndarray, count: int) -> np.ndarray:
    """The most similar wrong columns of each row, the right ones last: int [N, count]."""
    sim = np.where(is_right, -np.inf, sim)
    return np.argsort(-sim, axis=1, kind="stable")[:, :count]


def _as_stored(video: Features) -> Features:
    """Features as an index has them, which the first stage compares: bfloat16, as float32."""
    unit = video["frame_unit"]
    return {**video, "frame_unit": unit.astype(jnp.bfloat16).astype(unit.dtype)}


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{path} is of another training: {name} {found.get(name)}, not {value}; move it"
                " away to train anew"
            )


def _tensors(state: Any, best: Params) -> dict[str, np.ndarray]:
    leaves = {f"state/{n}": np.asarray(leaf) for n, leaf in enumerate(jax.tree.leaves(state))}
    return leaves | {f"best/{name}": x for name, x in flatten_dict(best, sep="/").items()}


def _restored(
    tensors: dict[str, np.ndarray], state: Any, best: Params, layout: Layout
) -> tuple[Any, Params]:
    leaves, tree = jax.tree.flatten(state)
    found = tree.unflatten(tensors[f"state/{n}"] for n in range(len(leaves)))
    paths = flatten_dict(best, sep="/", keep_empty_nodes=True)
    flat = {name: tensors[f"best/{name}"] for name in paths}
    return jax.device_put(found, layout.replicated), unflatten_dict(flat, sep="/")
