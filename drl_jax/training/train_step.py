"""The compiled steps: pure functions of arrays, with their layout over the mesh.

Under jit the loss sees the *global* batch, so there is no hand-written gather, gradients are exact
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
from drl_jax.models.drl import Params, model_definition
from drl_jax.sharding import Layout, map_row_chunks
from drl_jax.training.losses import cdcr_loss, contrastive_loss
from drl_jax.training.optimizer import MAX_LOGIT_SCALE
from drl_jax.training.state import TrainState, abstract_params, abstract_state

Arrays = Batch = dict[str, jax.Array]


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
        `frame_mask` bool [B, F], split over the mesh by rows.
      key: for what is random in training (xti's dropout, the rows of `cdcr` 1).
      definition: the model.
      config: the loss.
      layout: of the batch over the devices.
      microbatch: pairs to encode at a time; 0: all. The loss is that of the whole batch.

    Returns:
      loss, and its parts by name.
    """
    model = nnx.merge(definition, params)

    def encode(batch: Batch) -> tuple[Arrays, Arrays]:
        text = model.encode_text(batch["text_ids"], batch["text_mask"])
        return text, model.encode_frames(batch["frames"], batch["frame_mask"])

    if microbatch and microbatch < len(batch["text_ids"]):
        text, video = map_row_chunks(encode, batch, chunk=microbatch, layout=layout)
    else:
        text, video = encode(batch)
    dropout_key, cdcr_key = jax.random.split(key)

    # Rows (texts) stay where they are, videos are gathered once. Left alone, XLA gathers whichever
    # operand is smaller and may split the columns instead.
    all_videos = jax.tree.map(lambda x: with_sharding_constraint(x, layout.whole), video)
    sim_matrix = model.similarity(text, all_videos, dropout_key)
    sim_matrix = with_sharding_constraint(sim_matrix, layout.rows)
    contrastive = contrastive_loss(jnp.exp(model.clip.logit_scale[...]) * sim_matrix)
    parts = {"contrastive_loss": contrastive, "cdcr_loss": jnp.zeros(())}
    if config.cdcr:
        alphas = {"alpha1": config.cdcr_alpha1, "alpha2": config.cdcr_alpha2}
        parts["cdcr_loss"] = cdcr_loss(text, video, cdcr_key, cdcr=config.cdcr, **alphas)
    loss = contrastive + config.cdcr_lambda * parts["cdcr_loss"]
    return loss, {"loss": loss, **parts}


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
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step: the new state, and scalars to log (of the state before the step)."""
    loss_function = functools.partial(
        loss_and_parts, definition=definition, config=config, layout=layout, microbatch=microbatch
    )
    # A function of the seed and the step alone, so that a resumed run draws what it would have.
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grads, scalars = jax.grad(loss_function, has_aux=True)(state.params, batch, key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    logit_scale = params["clip"]["logit_scale"]
    params["clip"]["logit_scale"] = jnp.minimum(logit_scale, MAX_LOGIT_SCALE)
    scalars["grad_norm"] = optax.tree.norm(grads)
    scalars["logit_scale"] = jnp.exp(state.params["clip"]["logit_scale"])
    return TrainState(state.step + 1, params, opt_state), scalars


def make_train_step(
    model: ModelConfig,
    loss: LossConfig,
    tx: optax.GradientTransformation,
    layout: Layout,
    *,
    seed: int = 0,
    microbatch: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step` compiled for the mesh; it consumes the state it is given."""
    step = functools.partial(
        train_step,
        definition=model_definition(model),
        config=loss,
        tx=tx,
        seed=seed,
        layout=layout,
        microbatch=microbatch,
    )
    state = layout.parameters(abstract_state(model, tx, layout))
    return jax.jit(
        step,
        in_shardings=(state, layout.rows),
        out_shardings=(state, layout.whole),
        donate_argnums=0,
    )


def make_embed_steps(
    model: ModelConfig, layout: Layout, *, keep_tokens: bool = False
) -> tuple[Callable, Callable, Callable]:
    """Compiled `encode_text(params, text_ids, text_mask)`, `encode_frames(params, frames,
    frame_mask)` and `similarity(params, text, video)` for evaluation.

    Inputs and results are split over the mesh by rows; `similarity` gathers the videos.

    Args:
      model: the model.
      layout: of inputs and parameters.
      keep_tokens: whether the encoders return `text_feat`, `text_mask` and `frame_feat`,
        `frame_mask` for every interaction, beside the arrays that it compares.
    """
    definition = model_definition(model)
    whole, split = layout.whole, layout.rows
    # Under fsdp parameters stay split between calls.
    params = layout.parameters(abstract_params(model, layout))

    def encode_text(params, text_ids, text_mask):
        model = nnx.merge(definition, params)
        feat = model.clip.encode_text(text_ids)
        tokens = {"text_feat": feat, "text_mask": text_mask} if keep_tokens else {}
        return {**tokens, **model.interaction.text(feat, text_mask)}

    def encode_frames(params, frames, frame_mask):
        model = nnx.merge(definition, params)
        feat = model.frame_features(frames, frame_mask)
        tokens = {"frame_feat": feat, "frame_mask": frame_mask} if keep_tokens else {}
        return {**tokens, **model.interaction.video(feat, frame_mask)}

    def similarity(params, text, video):
        return nnx.merge(definition, params).similarity(text, video)

    return (
        jax.jit(encode_text, in_shardings=(params, split, split), out_shardings=whole),
        jax.jit(encode_frames, in_shardings=(params, split, split), out_shardings=whole),
        jax.jit(similarity, in_shardings=(params, split, whole), out_shardings=whole),
    )
