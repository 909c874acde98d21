"""The training step: state, loss and update, as pure functions that are compiled for the mesh.

The loss is contrastive, symmetric InfoNCE or SigLIP's, plus channel decorrelation (CDCR, section
3.3 of the paper); softmax may have an adaptive margin. Under jit it sees the *global* batch: there
is no explicit all-gather, gradients are exact, and the result does not depend on the number of
devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.lax import with_sharding_constraint

from drl_jax.config import LossConfig, ModelConfig
from drl_jax.models.drl import DRL, Params, abstract_params, init_params
from drl_jax.models.interactions import Arrays
from drl_jax.models.interactions.base import map_video_blocks
from drl_jax.models.linear import adapter_dropout
from drl_jax.models.ops import l2_normalize, masked_mean
from drl_jax.runtime.sharding import Layout, gather_and_compare, map_batch_chunks
from drl_jax.training.optimizer import MAX_LOGIT_SCALE, Averaged, norms
from drl_jax.training.trainable import Trainable

Batch = Arrays
Scalars = dict[str, jax.Array]
EVERYTHING = Trainable()

# ---------------------------------------------------------------- state


class TrainState(NamedTuple):
    """Everything that a training step changes; `params` are the average if there is one."""

    step: jax.Array
    params: Params
    opt_state: Any


def create_state(
    config: ModelConfig, tx: optax.GradientTransformation, seed: int, layout: Layout
) -> TrainState:
    """A new state with random parameters, created on the devices with its final shardings."""

    def create() -> TrainState:
        return _initial_state(init_params(config, jax.random.key(seed)), tx)

    return jax.jit(create, out_shardings=layout.parameters(jax.eval_shape(create)))()


def state_from_params(
    params: Params, tx: optax.GradientTransformation, layout: Layout
) -> TrainState:
    """The state before the first step, from parameters on the host or on one device."""
    params, create = jax.device_get(params), functools.partial(_initial_state, tx=tx)
    out_shardings = layout.parameters(jax.eval_shape(create, params))
    return jax.jit(create, out_shardings=out_shardings)(params)


def _initial_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_state(
    config: ModelConfig, tx: optax.GradientTransformation, layout: Layout
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its memory."""
    params, step = abstract_params(config, layout), jax.ShapeDtypeStruct((), jnp.int32)
    return layout.abstract(TrainState(step, params, jax.eval_shape(tx.init, params)))


# ---------------------------------------------------------------- loss


def loss_and_parts(
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    definition: nnx.GraphDef,
    config: LossConfig,
    layout: Layout,
    microbatch: int = 0,
) -> tuple[jax.Array, Scalars]:
    """The training loss of a global batch of matched pairs.

    Args:
      params: of the model `definition`.
      batch: `text_ids` int32 [B, L], `text_mask` bool [B, L], `frames` uint8 [B, F, H, W, 3],
        `frame_mask` bool [B, F], batch-sharded. With stored features, `text_ids` are those of texts
        [B, 1 + L, D] and `frames` those of frames [B, F, D].
      key: for xti's dropout and the random rows of `cdcr` 1.
      microbatch: pairs to encode at a time; 0: all. The loss is that of the whole batch.

    Returns:
      The loss, and by name its parts and the interaction's statistics, float32 scalars.
    """
    model = nnx.merge(definition, params)

    def encode(params: Params, batch: Batch) -> tuple[Arrays, Arrays, jax.Array | None]:
        model = nnx.merge(definition, params)
        keys = [jax.random.key(seeds[0]) for seeds in batch.get("seeds", ())] or [None, None]
        frame_mask = batch["frame_mask"]
        with adapter_dropout(keys[0]):
            tokens = model.text_features(batch["text_ids"], batch["text_mask"])
        text = model.interaction.encode_text(tokens, batch["text_mask"])
        with adapter_dropout(keys[1]):
            images = model.image_features(batch["frames"], frame_mask)
        video = model.interaction.encode_video(model.aggregate(images, frame_mask), frame_mask)
        unit = pair_unit(tokens.sentence, images, frame_mask) if config.margin else None
        return text, video, unit

    if batch["frames"].ndim > 3 and model.backbone.transformer.dropout:
        # One for each row, of which a chunk of rows uses its first.
        bits = jax.random.bits(jax.random.fold_in(key, 2), (2, len(batch["text_ids"])))
        batch = {**batch, "seeds": tuple(bits)}

    if microbatch and microbatch < len(batch["text_ids"]):
        encoded = map_batch_chunks(encode, params, batch, chunk=microbatch, layout=layout)
    else:
        encoded = encode(params, batch)
    text, video, unit = encoded
    margin = None if unit is None else adaptive_margin(unit, config, layout)
    dropout_key, cdcr_key = jax.random.split(key)
    contrastive, parts = _contrastive_loss(
        model, text, video, margin, dropout_key, name=config.contrastive, layout=layout
    )
    cdcr = jnp.zeros(())
    if config.cdcr:
        correlation = model.interaction.channel_correlation(text, video, cdcr_key, config.cdcr)
        cdcr = decorrelation_loss(correlation, config.cdcr_alpha1, config.cdcr_alpha2)
    loss = contrastive + config.cdcr_lambda * cdcr
    terms = {"loss": loss, "contrastive_loss": contrastive, "cdcr_loss": cdcr}
    return loss, {**terms, **parts, **model.interaction.statistics(text, video)}


def make_gradient(
    model: ModelConfig, loss: LossConfig, layout: Layout, trainable: Trainable, microbatch: int = 0
) -> Callable[[Params, Params, Batch, jax.Array], tuple[Params, Scalars]]:
    """The gradient of the trained part of the parameters, and `loss_and_parts`' scalars.

    The function takes the two parts of `Trainable.split`, a batch and a key.
    """
    settings: dict[str, Any] = {"config": loss, "layout": layout, "microbatch": microbatch}
    definition = trainable.definition(model)

    def of_parts(trained: Params, frozen: Params, *inputs: Any) -> tuple[jax.Array, Scalars]:
        params = trainable.join(trained, frozen)
        return loss_and_parts(params, *inputs, definition=definition, **settings)

    return jax.grad(of_parts, has_aux=True)


def pair_unit(sentence: jax.Array, images: jax.Array, frame_mask: jax.Array) -> jax.Array:
    """A unit vector of each pair for `adaptive_margin`, without a gradient.

    The cosine of two pairs is the mean of those of their sentences and of their videos, each the
    mean of unit frames before the temporal head: [B, D], [B, F, D], bool [B, F] -> [B, 2 * D].
    """
    video = l2_normalize(masked_mean(l2_normalize(images), frame_mask))
    both = jnp.concatenate([l2_normalize(sentence), video], axis=1)
    return jax.lax.stop_gradient(both * 0.5**0.5)


def adaptive_margin(unit: jax.Array, config: LossConfig, layout: Layout) -> jax.Array:
    """What is added to the similarity of text i and video j: [B, D], batch-sharded -> [B, B].

    min(margin_scale * (1 - cosine of the pairs i and j), margin); 0 where i = j. Negatives that are
    unlike the positive have to be further away than those that may be true. From AVIGATE
    (arXiv 2504.02397), which uses margin 0.1 and margin_scale 0.2.
    """
    cosine = gather_and_compare(lambda rows, all_: rows @ all_.T, unit, unit, layout=layout)
    margin = jnp.minimum(config.margin_scale * (1 - cosine), config.margin)
    return jnp.where(jnp.eye(len(margin), dtype=bool), 0.0, margin)


def _contrastive_loss(
    model: DRL,
    text: Arrays,
    video: Arrays,
    margin: jax.Array | None,
    key: jax.Array,
    *,
    name: str,
    layout: Layout,
) -> tuple[jax.Array, Scalars]:
    """The loss `name` (`LossConfig.contrastive`) of batch-sharded pairs, and its parts by name."""
    scale = jnp.exp(model.backbone.logit_scale[...])
    if name == "softmax" and not model.interaction.HAS_DROPOUT:
        compare = functools.partial(model.similarity, key=None)
        sim_matrix = gather_and_compare(compare, text, video, layout=layout)
        return softmax_loss(scale * (sim_matrix if margin is None else sim_matrix + margin))
    # Texts stay sharded and videos are gathered once. Without the constraints, XLA gathers the
    # smaller operand and may split the columns instead.
    all_videos = jax.tree.map(lambda x: with_sharding_constraint(x, layout.replicated), video)
    if name == "softmax":
        # Dropout is drawn for the global batch.
        sim_matrix = model.similarity(text, all_videos, key)
        sim_matrix = with_sharding_constraint(sim_matrix, layout.batch_sharded)
        return softmax_loss(scale * (sim_matrix if margin is None else sim_matrix + margin))
    bias = model.backbone.logit_bias[...]

    def logits(part: Arrays, key: jax.Array | None) -> jax.Array:
        sim_matrix = model.interaction.similarity(text, part, key)
        return scale * with_sharding_constraint(sim_matrix, layout.batch_sharded) + bias

    return sigmoid_loss(logits, all_videos, key, model.similarity_block), {}


def softmax_loss(logits: jax.Array) -> tuple[jax.Array, Scalars]:
    """Mean cross-entropy of both directions; text i belongs to video i.

    Args:
      logits: float32 [B, B], similarities times exp(logit_scale).

    Returns:
      The loss, and that of each direction as `t2v_loss` and `v2t_loss`, float32 scalars.
    """
    # Reduced over rows and over columns in place: with rows on different devices, a transposition
    # would move the whole matrix, and column sums move one number per column.
    matched = jnp.sum(jnp.where(jnp.eye(len(logits), dtype=bool), logits, 0.0), axis=1)
    # Subtracted first, so that what all logits have in common cancels in the gradient, too.
    t2v = jax.nn.logsumexp(logits - matched[:, None], axis=1)
    v2t = jax.nn.logsumexp(logits - matched[None, :], axis=0)
    t2v, v2t = t2v.mean(), v2t.mean()
    return (t2v + v2t) / 2, {"t2v_loss": t2v, "v2t_loss": v2t}


def sigmoid_loss(
    logits: Callable[[Arrays, jax.Array | None], jax.Array],
    video: Arrays,
    key: jax.Array | None,
    block: int,
) -> jax.Array:
    """SigLIP's loss of independent pairs; text i belongs to video i.

    -1/B sum_ij log sigmoid(z_ij logits_ij), z = 1 where i = j and -1 elsewhere (arXiv 2303.15343).
    It is summed over blocks of videos, so that the [B, B] matrix never exists.

    Args:
      logits: maps the arrays of N videos and a key to float32 [B, N], similarities times
        exp(logit_scale) plus logit_bias.
      video: the interaction's arrays of B videos.
      key: for dropout, as in `map_video_blocks`, or None.
      block: videos per block; 0: all.
    """

    # A sum for each text, not one for all: with rows on different devices, the forward loop then
    # needs no collective.
    def text_losses(arrays: Arrays, columns: jax.Array, key: jax.Array | None) -> jax.Array:
        part = logits(arrays, key)
        matched = jnp.arange(len(part))[:, None] == columns
        losses = -jax.nn.log_sigmoid(jnp.where(matched, part, -part))
        return jnp.sum(jnp.where(columns < len(part), losses, 0.0), axis=1)

    losses = map_video_blocks(text_losses, video, key, block)  # [blocks, B]
    return jnp.sum(losses) / losses.shape[1]


def decorrelation_loss(correlation: jax.Array, alpha1: float, alpha2: float) -> jax.Array:
    """Penalty on a cross-correlation of channels: [D, D] -> scalar.

    alpha1 * sum_i (c_ii - 1)^2 + alpha2 * sum_{i != j} c_ij^2, before `cdcr_lambda`.
    """
    diagonal = jnp.diagonal(correlation)
    on_diagonal = jnp.sum((diagonal - 1) ** 2)
    off_diagonal = jnp.sum(correlation**2) - jnp.sum(diagonal**2)
    return alpha1 * on_diagonal + alpha2 * off_diagonal


# ---------------------------------------------------------------- step


def make_train_step(
    model: ModelConfig,
    loss: LossConfig,
    tx: optax.GradientTransformation,
    layout: Layout,
    *,
    seed: int = 0,
    microbatch: int = 0,
    norms_every: int = 1,
    trainable: Trainable = EVERYTHING,
) -> Callable[[TrainState, Batch], tuple[TrainState, Scalars]]:
    """Compiles an optimiser step for the mesh; the state it is given is donated.

    `trainable` is that of the optimiser `tx`.

    It returns the new state, and scalars of the old one to log (docs/metrics.md). If the loss or a
    gradient is not finite, parameters and moments stay as they were, and counters advance: the
    batch is left out. Norms of parameters and updates are NaN but every `norms_every` steps.
    """
    gradient = make_gradient(model, loss, layout, trainable, microbatch)
    is_sigmoid = loss.contrastive == "sigmoid"

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        # Depends on the seed and the step only, so that a resumed run draws the same numbers.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        trained, frozen = trainable.split(state.params)
        if isinstance(state.opt_state, Averaged):
            trained = state.opt_state.iterate
        grads, scalars = gradient(trained, frozen, batch, key)
        scalars |= norms("grad_norm", grads) | _state_norms(state, grads, tx, norms_every)
        scalars["logit_scale"] = jnp.exp(state.params["backbone"]["logit_scale"])
        if is_sigmoid:
            scalars["logit_bias"] = state.params["backbone"]["logit_bias"]
        # A finite state and a finite gradient, whose norm is clipped, give a finite state.
        finite = jnp.isfinite(scalars["loss"]) & jnp.isfinite(scalars["grad_norm"])
        # Always true, but the update now waits for the norms of the state that it overwrites. XLA
        # would copy the parameters otherwise.
        finite &= ~(scalars["update_norm"] < 0)
        new = apply_gradients(state, grads, tx, trainable, bound_scale=not is_sigmoid)

        def select(new: jax.Array, old: jax.Array) -> jax.Array:
            is_counter = jnp.issubdtype(new.dtype, jnp.integer)
            return new if is_counter else jnp.where(finite, new, old)

        return jax.tree.map(select, new, state), scalars

    state = layout.parameters(abstract_state(model, tx, layout))
    return jax.jit(
        layout.on_mesh(train_step, model.dtype),
        in_shardings=(state, layout.batch_sharded),
        out_shardings=(state, layout.replicated),
        donate_argnums=0,
    )


def _state_norms(
    state: TrainState, grads: Params, tx: optax.GradientTransformation, every: int
) -> Scalars:
    """Norms of the parameters and of their update, every so many steps; NaN in between.

    They read parameters, gradients and moments once more: 3 % of the time of a step of
    `configs/shapes.py` on a CPU, half of whose parameters are embeddings of tokens.
    """

    def compute() -> Scalars:
        # Computed here and not passed, so that updates are not kept in memory for it.
        updates, _ = tx.update(grads, state.opt_state, state.params)
        return norms("param_norm", state.params) | norms("update_norm", updates)

    def leave_out() -> Scalars:
        shapes = jax.eval_shape(compute)
        return jax.tree.map(lambda norm: jnp.full(norm.shape, jnp.nan, norm.dtype), shapes)

    return jax.lax.cond((state.step + 1) % every == 0, compute, leave_out)


def apply_gradients(
    state: TrainState,
    grads: Params,
    tx: optax.GradientTransformation,
    trainable: Trainable = EVERYTHING,
    *,
    bound_scale: bool = True,
) -> TrainState:
    """Updates the state; with `bound_scale`, exp(logit_scale) stays at most 100, as in CLIP."""
    average, frozen = trainable.split(state.params)
    is_averaged = isinstance(state.opt_state, Averaged)
    trained = state.opt_state.iterate if is_averaged else average
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    trained = optax.apply_updates(trained, updates)
    if bound_scale and "logit_scale" in trained.get("backbone", {}):
        logit_scale = trained["backbone"]["logit_scale"]
        trained["backbone"]["logit_scale"] = jnp.minimum(logit_scale, MAX_LOGIT_SCALE)
    if is_averaged:
        opt_state = opt_state._replace(iterate=trained)
        decay = jnp.minimum(trainable.ema, (1 + state.step) / (10 + state.step))
        trained = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, trained)
    return TrainState(state.step + 1, trainable.join(trained, frozen), opt_state)
