"""Temporal aggregation of frame features (the reference's `agg_module`)."""

from collections.abc import Collection
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, normal

from drl_jax.config import ModelConfig
from drl_jax.models.attention import AttentionMask
from drl_jax.models.heads import Head, count_blocks
from drl_jax.models.layers import Transformer, new_block_config, new_block_init
from drl_jax.models.ops import lengths_of


class TemporalHead(Head):
    """Maps frame features to frame features that depend on each other.

    A new head is a subclass that is registered (`models.registry`) or an entry of `TEMPORAL_HEADS`.
    """

    def __call__(self, frame_feat: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """frame_feat [B, F, D], frame_mask bool [B, F], valid frames first -> [B, F, D]."""
        raise NotImplementedError


class SequenceTransformer(TemporalHead):
    """seqTransf: position embeddings, CLIP-style blocks over the valid frames, and a residual."""

    COPIED_POSITIONS: ClassVar = "frame_position_embeddings"
    REFERENCE_NAMES: ClassVar = (
        (r"^transformer/", "transformerClip/"),
        (r"^frame_position_embeddings/", "frame_position_embeddings/"),
    )

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        positions, width = config.backbone.context_length, config.backbone.embed_dim
        init = normal(config.position_std or 0.02)
        self.frame_position_embeddings = nnx.Embed(positions, width, embedding_init=init, rngs=rngs)
        self.transformer = Transformer(
            new_block_config(config.backbone),
            config.temporal_layers,
            init=new_block_init(),
            run=config,
            rngs=rngs,
        )

    def __call__(self, frame_feat: jax.Array, frame_mask: jax.Array) -> jax.Array:
        x = frame_feat + self.frame_position_embeddings(jnp.arange(frame_feat.shape[1]))
        # Masks keys only: padded frames have an output, which interactions mask.
        return frame_feat + self.transformer(x, AttentionMask(lengths=lengths_of(frame_mask)))

    @classmethod
    def config_of_weights(cls, names: Collection[str]) -> dict[str, Any] | None:
        layers = count_blocks(names, "transformerClip")
        return {"temporal_layers": layers} if layers else None


class SequenceLSTM(TemporalHead):
    """seqLSTM: one LSTM layer over the valid frames, and a residual; torch's gate order i, f, g, o.

    Valid frames come first, so a padded frame never affects a valid one; its output is its input.
    """

    REFERENCE_NAMES: ClassVar = (
        (r"^(ih|hh)/kernel$", r"lstm_visual/weight_\1_l0"),
        (r"^(ih|hh)/bias$", r"lstm_visual/bias_\1_l0"),
    )
    # Positions of seqTransf, which the reference creates for seqLSTM, too.
    UNUSED_REFERENCE_NAMES: ClassVar = ("frame_position_embeddings.weight",)

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.backbone.embed_dim
        init = _symmetric_uniform(width**-0.5)
        self.ih, self.hh = (
            nnx.Linear(width, 4 * width, kernel_init=init, bias_init=init, rngs=rngs)
            for _ in range(2)
        )

    def __call__(self, frame_feat: jax.Array, frame_mask: jax.Array) -> jax.Array:
        gates_of_input = jnp.moveaxis(self.ih(frame_feat), 1, 0)  # [F, B, 4D]
        recurrent, weights = nnx.split(self.hh)

        def run_frame(carry, gates):
            hidden, cell = carry
            i, f, g, o = jnp.split(gates + nnx.merge(recurrent, weights)(hidden), 4, axis=-1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (hidden, cell), hidden

        zeros = jnp.zeros_like(frame_feat[:, 0])
        _, outputs = jax.lax.scan(run_frame, (zeros, zeros), gates_of_input)
        # [F, B, D] -> [B, F, D]
        return frame_feat + jnp.moveaxis(outputs, 0, 1) * frame_mask[:, :, None]

    @classmethod
    def config_of_weights(cls, names: Collection[str]) -> dict[str, Any] | None:
        return {} if "lstm_visual.weight_ih_l0" in names else None


def _symmetric_uniform(bound: float) -> Initializer:
    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


# None: frame features are used as the backbone gives them.
TEMPORAL_HEADS: dict[str, type[TemporalHead] | None] = {
    "none": None,
    "seqLSTM": SequenceLSTM,
    "seqTransf": SequenceTransformer,
}
