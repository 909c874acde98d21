"""Trains the reranker of a run: after its first stage, on stored features.

Each epoch draws one caption of every training video. The loss is the contrastive one of both
directions, within batches as large as a gallery: the wrong candidates that the first stage takes
for similar ones weigh most. The epoch that is best on *val* is kept; the first stage alone is what
it has to beat.
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
from tqdm import tqdm

from drl_jax.config import Config
from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.data.splits import Split
from drl_jax.evaluation.evaluator import Evaluator, check_split
from drl_jax.evaluation.metrics import summary
from drl_jax.evaluation.reranking import RerankScorer, rerank_evaluation
from drl_jax.models.drl import Params
from drl_jax.models.interactions import Features
from drl_jax.models.interactions.token_wise import TokenWise
from drl_jax.models.ops import masked_mean
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
from drl_jax.runtime.sharding import make_layout
from drl_jax.weights.errors import WeightsError

_BATCH = 256  # Pairs, at most; smaller batches have fewer wrong candidates that are similar.
_WARMUP, _DECAY, _MAX_NORM = 0.1, 0.1, 1.0
# Videos whose words and frames are whitened.
_WHITENED = 2000
# Of a study: a reranker that does not see the first stage's similarity, or the order of frames.
NO_PRIOR, NO_ORDER = "no_prior", "no_order"


@dataclasses.dataclass(frozen=True)
class RerankSettings:
    """What a training of a reranker depends on beside its run.

    Attributes:
      candidates: of each query on val that are ranked again, to choose the epoch.
      variant: empty, or what the reranker lacks, for a study: NO_PRIOR or NO_ORDER.
    """

    candidates: int = 20
    epochs: int = 60
    seed: int = 0
    lr: float = 1e-2
    variant: str = ""

    def seen(self, video: Features, sim: np.ndarray) -> tuple[Features, np.ndarray]:
        """What the reranker reads of videos, and of similarities [A, B]."""
        if self.variant == NO_ORDER:
            mean = masked_mean(video["frame_unit"], video["frame_mask"])
            frames = np.broadcast_to(np.asarray(mean)[:, None], video["frame_unit"].shape)
            video = {**video, "frame_unit": frames}
        return video, np.zeros_like(sim) if self.variant == NO_PRIOR else sim


def train_reranker(
    workdir: Path,
    config: Config,
    settings: RerankSettings,
    *,
    features: str = "",
    target: Path | None = None,
) -> dict[str, Any]:
    """Trains a reranker of the best checkpoint of a run, and writes `reranker.safetensors`.

    A training that was killed continues after its last epoch, and ends with the same file.

    Args:
      features: directory of the stored features; empty: that of the run.
      target: the file to write; None: in the run.

    Returns:
      What the file says of the training.

    Raises:
      UserError: no such run or dataset, a first stage without words and frames, too few videos,
        features of something else, or a file of another training.
    """
    target, layout = target or workdir / RERANKER_FILE, make_layout()
    sizes = RerankerConfig.of(config.model, config.data.max_frames)
    if not (features := features or config.data.features):
        raise UserError("--features=DIR is missing: where the features of the towers are stored")
    step, params = restore_params(workdir, config.model, layout, "best")
    data = dataclasses.replace(config.data, features=str(features))
    config = dataclasses.replace(config, data=data)
    dataset = VideoDataset(dataset_dir(config))
    splits = [load_split(dataset, name, config.data) for name in ("train", "val", "test")]
    train, val, _ = splits
    if settings.candidates > len(val.videos):
        raise UserError(
            f"--candidates={settings.candidates} is above the {len(val.videos)} videos of val"
        )
    check_split("val", val, dataset, load_tokenizer(config.model), config.data.max_words)
    with exclusive(workdir):
        identity = {"first_stage": first_stage_sha256(params), "step": step}
        identity |= dataclasses.asdict(settings)
        if target.exists():
            _, found = read_tensors(target)
            _check_same(target, found, identity)
            return found
        stored = stored_features(config, dataset, splits, params, layout)
        evaluator = Evaluator(config, dataset, layout, stored)
        videos = evaluator.encode_videos(params, train.videos)
        # As an index has them, which the first stage compares.
        videos["frame_unit"] = videos["frame_unit"].astype(jnp.bfloat16).astype(np.float32)
        evaluation = evaluator.run(params, val)
        scorer, steps = RerankScorer(sizes), -(-len(train.videos) // _BATCH)
        tx = _optimizer(settings, settings.epochs * steps)
        step_function = make_step(sizes, tx)
        first = train.captions.offsets[:-1][:_WHITENED].tolist()
        text = evaluator.encode_captions(params, [train.captions.caption(n) for n in first])
        some = {name: array[:_WHITENED] for name, array in videos.items()}
        key = jax.random.key(settings.seed)
        best = jax.device_get(init_reranker(sizes, params, text, some, key))
        state = (best, tx.init(best))
        history, losses = [float(evaluation.metrics["t2v"]["R@1"])], []
        # A variant of a study need not beat the first stage.
        floor = -1.0 if settings.variant else history[0]
        unfinished = target.with_name(f"{target.stem}_state.safetensors")
        if unfinished.exists():
            tensors, found = read_tensors(unfinished)
            _check_same(unfinished, found, identity)
            tree = jax.tree.structure((state, best))
            if len(tensors) != tree.num_leaves:
                raise WeightsError(f"{unfinished} is no unfinished training; delete it")
            state, best = tree.unflatten(tensors[str(n)] for n in range(len(tensors)))
            history, losses = found["val_t2v_R1"], found["losses"]
            print(f"resuming {unfinished} after epoch {len(losses)}")
        about = {**identity, "val_t2v_R1": history, "losses": losses}
        val_video, val_sim = settings.seen(evaluation.video, evaluation.sim_matrix)
        for epoch in range(len(history), settings.epochs + 1):
            batches = _batches(evaluator, params, train, videos, settings, epoch)
            of_steps = []
            for batch in tqdm(batches, f"epoch {epoch}", steps, leave=False):
                *state, loss = step_function(*state, batch)
                of_steps.append(loss)
            scores = val_sim + scorer.changes(state[0], evaluation.text, val_video)
            ranks = rerank_evaluation(scores, evaluation, settings.candidates).ranks
            value = summary(ranks.t2v)["R@1"]
            # Of equal epochs, the last one has learned most.
            if value > floor and value >= max(history[1:], default=0):
                best = jax.device_get(state[0])
            history.append(value)
            losses.append(float(np.mean(jax.device_get(of_steps))))
            print(
                f"epoch {epoch} of {settings.epochs}: loss {losses[-1]:.4f}, val t2v R@1"
                f" {value:.1f} of {settings.candidates} candidates (first stage {history[0]:.1f})",
                flush=True,
            )
            leaves = enumerate(jax.tree.leaves((tuple(state), best)))
            write_tensors(unfinished, {str(n): np.asarray(x) for n, x in leaves}, about)
        about["epoch"] = _best_epoch(floor, history[1:])
        save_reranker(target, sizes, best, about)
        unfinished.unlink(missing_ok=True)
    return about


def _optimizer(settings: RerankSettings, steps: int) -> optax.GradientTransformation:
    warmup = int(_WARMUP * steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.lr, warmup, steps)
    clip = optax.clip_by_global_norm(_MAX_NORM)
    return optax.chain(clip, optax.adamw(schedule, weight_decay=_DECAY))


def _best_epoch(floor: float, values: list[float]) -> int:
    """The last of the best epochs, from 1; 0: none is above the floor."""
    best = max(values)
    return len(values) - values[::-1].index(best) if best > floor else 0


def make_step(sizes: RerankerConfig, tx: optax.GradientTransformation) -> Any:
    """The compiled update: parameters, state of the optimiser, batch -> both anew, and the loss.

    A batch has the arrays `text` and `video` of B pairs, the similarities `sim` [B, B] of the first
    stage, and bool `is_right` [B, B].
    """
    definition, _ = reranker_definition(sizes)

    def loss_of(params, batch):
        reranker = nnx.merge(definition, params)
        logits = jnp.exp(reranker.logit_scale[...]) * batch["sim"]
        logits += reranker(batch["text"], batch["video"])
        own = jnp.diagonal(logits)
        # Another video with the same caption is neither wrong nor what is looked for.
        others = batch["is_right"] & ~jnp.eye(len(own), dtype=bool)
        logits = jnp.where(others, -jnp.inf, logits)
        of_both = jax.nn.logsumexp(logits, axis=0) + jax.nn.logsumexp(logits, axis=1)
        return jnp.mean(of_both / 2 - own)

    def step(params, opt_state, batch):
        with jax.default_matmul_precision("highest"):
            loss, gradient = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def _batches(
    evaluator: Evaluator,
    params: Params,
    train: Split,
    videos: Features,
    settings: RerankSettings,
    epoch: int,
) -> Iterator[dict[str, Any]]:
    """The batches of an epoch, which follow from the seed and its number."""
    rng, offsets = np.random.default_rng([settings.seed, epoch]), train.captions.offsets
    drawn = offsets[:-1] + (rng.random(len(videos["frame_mask"])) * np.diff(offsets)).astype(int)
    size = min(_BATCH, len(drawn))
    # The last batch has some of the first one: every batch has one shape.
    order = np.resize(rng.permutation(len(drawn)), -(-len(drawn) // size) * size)
    for rows in order.reshape(-1, size):
        captions = [train.captions.caption(pair) for pair in drawn[rows].tolist()]
        text = evaluator.encode_captions(params, captions)
        video = {name: array[rows] for name, array in videos.items()}
        sim = evaluator.embedder.similarity(params, text, video)
        video, sim = settings.seen(video, sim)
        same = np.unique(captions, return_inverse=True)[1]
        batch = {"sim": sim, "is_right": same[:, None] == same}
        for side, arrays, names in (
            ("text", text, TokenWise.TEXT_ARRAYS),
            ("video", video, TokenWise.VIDEO_ARRAYS),
        ):
            batch[side] = {name: np.asarray(arrays[name]) for name in names}
        yield batch


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{path} is of another training: {name} {found.get(name)}, not {value}; move it"
                " away to train anew"
            )
