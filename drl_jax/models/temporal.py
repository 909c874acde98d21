"""The temporal head: what relates the frames of a video (`agg_module` in the reference)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, normal

from drl_jax.config import ModelConfig
from drl_jax.models.layers import Run, Transformer, new_block_init

# The reference's heads use BERT's LayerNorm, whose epsilon is not CLIP's 1e-5.
LN_EPS = 1e-12


class SequenceTransformer(nnx.Module):
    """seqTransf: position embeddings, CLIP-style blocks over the valid frames, and a residual."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.clip.text_width
        self.frame_position_embeddings = nnx.Embed(
            config.clip.context_length,
            width,
            embedding_init=normal(config.position_std or 0.02),
            rngs=rngs,
        )
        self.transformer = Transformer(
            width,
            config.temporal_layers,
            config.clip.text_heads,
            eps=LN_EPS,
            init=new_block_init(),
            run=Run.of(config),
            rngs=rngs,
        )

    def __call__(self, frame_feat: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """frame_feat [B, F, D], frame_mask bool [B, F] -> [B, F, D]."""
        positions = jnp.arange(frame_feat.shape[1])
        x = frame_feat + self.frame_position_embeddings(positions)
        # Keys only: a padded frame still gets an output, which later masks drop.
        return frame_feat + self.transformer(x, frame_mask[:, None, None, :])


class SequenceLSTM(nnx.Module):
    """seqLSTM: one LSTM layer over the valid frames, plus its input; gates are torch's i, f, g, o.

    Valid frames come first, so a padded frame never reaches a valid one; it keeps its input.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.clip.embed_dim
        bound = width**-0.5

        def linear() -> nnx.Linear:
            init = _symmetric_uniform(bound)
            return nnx.Linear(width, 4 * width, kernel_init=init, bias_init=init, rngs=rngs)

        self.ih, self.hh = linear(), linear()

    def __call__(self, frame_feat: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """frame_feat [B, F, D], frame_mask bool [B, F] -> [B, F, D]."""
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
        return frame_feat + jnp.moveaxis(outputs, 0, 1) * frame_mask[:, :, None]


def _symmetric_uniform(bound: float) -> Initializer:
    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


HEADS = {"none": None, "seqTransf": SequenceTransformer, "seqLSTM": SequenceLSTM}
