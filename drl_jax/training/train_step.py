"""The training step: a pure function, compiled for the mesh.

Under jit the loss sees the *global* batch, so there is no explicit all-gather, gradients are exact
and the result does not depend on the number of devices.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.lax import with_sharding_constraint

from drl_jax.config import LossConfig, ModelConfig
from drl_jax.models.drl import DRL, Params, model_definition
from drl_jax.models.interactions import Arrays
from drl_jax.sharding import Layout, map_batch_chunks
from drl_jax.training.losses import sigmoid_loss, softmax_loss, total_loss
from drl_jax.training.optimizer import MAX_LOGIT_SCALE, norms
from drl_jax.training.state import TrainState, abstract_state

Batch = Arrays


def loss_and_parts(
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    definition: nnx.GraphDef,
    config: LossConfig,
    layout: Layout,
    microbatch: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss of a global batch.

    Args:
      params: the model's parameters.
      batch: `text_ids` int32 [B, L], `text_mask` bool [B, L], `frames` uint8 [B, F, H, W, 3],
        `frame_mask` bool [B, F], batch-sharded.
      key: for xti's dropout and the random rows of `cdcr` 1.
      definition: the model.
      config: the loss.
      layout: shardings.
      microbatch: pairs to encode at a time; 0: all. The loss is that of the whole batch.

    Returns:
      The loss, and by name its parts and the interaction's statistics, float32 scalars.
    """
    model = nnx.merge(definition, params)

    def encode(batch: Batch) -> tuple[Arrays, Arrays]:
        text = model.encode_text(batch["text_ids"], batch["text_mask"])
        return text, model.encode_video(batch["frames"], batch["frame_mask"])

    if microbatch and microbatch < len(batch["text_ids"]):
        text, video = map_batch_chunks(encode, batch, chunk=microbatch, layout=layout)
    else:
        text, video = encode(batch)
    dropout_key, cdcr_key = jax.random.split(key)
    contrastive, parts = _contrastive_loss(
        model, text, video, dropout_key, name=config.contrastive, layout=layout
    )
    loss, terms = total_loss(
        contrastive, text, video, cdcr_key, interaction=model.interaction, config=config
    )
    return loss, {**terms, **parts, **model.interaction.statistics(text, video)}


def _contrastive_loss(
    model: DRL, text: Arrays, video: Arrays, key: jax.Array, *, name: str, layout: Layout
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss `name` (`LossConfig.contrastive`) of batch-sharded pairs, and its parts by name."""
    # Texts stay sharded and videos are gathered once. Without the constraints, XLA gathers the
    # smaller operand and may split the columns instead.
    all_videos = jax.tree.map(lambda x: with_sharding_constraint(x, layout.replicated), video)
    scale = jnp.exp(model.backbone.logit_scale[...])
    if name == "softmax":
        sim_matrix = model.similarity(text, all_videos, key)
        return softmax_loss(scale * with_sharding_constraint(sim_matrix, layout.batch_sharded))
    bias = model.backbone.logit_bias[...]

    def logits(part: Arrays, key: jax.Array | None) -> jax.Array:
        sim_matrix = model.interaction.similarity(text, part, key)
        return scale * with_sharding_constraint(sim_matrix, layout.batch_sharded) + bias

    return sigmoid_loss(logits, all_videos, key, model.similarity_block), {}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    definition: nnx.GraphDef,
    config: LossConfig,
    tx: optax.GradientTransformation,
    seed: int,
    layout: Layout,
    microbatch: int = 0,
    norms_every: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step.

    Returns:
      The new state, and scalars of the old state to log (docs/metrics.md). If the loss or a
      gradient is not finite, parameters and moments stay as they were, and counters advance: the
      batch is left out. Norms of parameters and updates are NaN but every `norms_every` steps.
    """
    loss_function = functools.partial(
        loss_and_parts, definition=definition, config=config, layout=layout, microbatch=microbatch
    )
    # Depends on the seed and the step only, so that a resumed run draws the same numbers.
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grads, scalars = jax.grad(loss_function, has_aux=True)(state.params, batch, key)
    scalars |= norms("grad_norm", grads) | _state_norms(state, grads, tx, norms_every)
    scalars["logit_scale"] = jnp.exp(state.params["backbone"]["logit_scale"])
    is_sigmoid = config.contrastive == "sigmoid"
    if is_sigmoid:
        scalars["logit_bias"] = state.params["backbone"]["logit_bias"]
    # A finite state and a finite gradient, whose norm is clipped, give a finite state.
    finite = jnp.isfinite(scalars["loss"]) & jnp.isfinite(scalars["grad_norm"])
    # Always true, but the update now waits for the norms of the state that it overwrites. XLA would
    # copy the parameters otherwise.
    finite &= ~(scalars["update_norm"] < 0)
    new = apply_gradients(state, grads, tx, bound_scale=not is_sigmoid)
    return _select(finite, new, state), scalars


def _state_norms(
    state: TrainState, grads: Params, tx: optax.GradientTransformation, every: int
) -> dict[str, jax.Array]:
    """Norms of the parameters and of their update, every so many steps; NaN in between.

    They read parameters, gradients and moments once more: 3 % of the time of a step of
    `configs/shapes.py` on a CPU, half of whose parameters are embeddings of tokens.
    """

    def compute() -> dict[str, jax.Array]:
        # Computed here and not passed, so that updates are not kept in memory for it.
        updates, _ = tx.update(grads, state.opt_state, state.params)
        return norms("param_norm", state.params) | norms("update_norm", updates)

    def leave_out() -> dict[str, jax.Array]:
        shapes = jax.eval_shape(compute)
        return jax.tree.map(lambda norm: jnp.full(norm.shape, jnp.nan, norm.dtype), shapes)

    due = (state.step + 1) % every == 0
    return jax.lax.cond(due, compute, leave_out)


def _select(condition: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state if the condition holds, or else the old one with the new counters."""

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        is_counter = jnp.issubdtype(new.dtype, jnp.integer)
        return new if is_counter else jnp.where(condition, new, old)

    return jax.tree.map(select, new, old)


def apply_gradients(
    state: TrainState,
    grads: Params,
    tx: optax.GradientTransformation,
    *,
    bound_scale: bool = True,
) -> TrainState:
    """Updates parameters and optimiser state.

    Args:
      state: before the step.
      grads: of its parameters.
      tx: the optimiser.
      bound_scale: whether exp(logit_scale) stays at most 100, as in CLIP. SigLIP's is above.

    Returns:
      The state after the step.
    """
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if bound_scale:
        logit_scale = params["backbone"]["logit_scale"]
        params["backbone"]["logit_scale"] = jnp.minimum(logit_scale, MAX_LOGIT_SCALE)
    return TrainState(state.step + 1, params, opt_state)


def make_train_step(
    model: ModelConfig,
    loss: LossConfig,
    tx: optax.GradientTransformation,
    layout: Layout,
    *,
    seed: int = 0,
    microbatch: int = 0,
    norms_every: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles `train_step` for the mesh; the state it is given is donated."""
    step = functools.partial(
        train_step,
        definition=model_definition(model),
        config=loss,
        tx=tx,
        seed=seed,
        layout=layout,
        microbatch=microbatch,
        norms_every=norms_every,
    )
    state = layout.parameters(abstract_state(model, tx, layout))
    return jax.jit(
        layout.on_mesh(step, model.dtype),
        in_shardings=(state, layout.batch_sharded),
        out_shardings=(state, layout.replicated),
        donate_argnums=0,
    )
