"""The temporal head: attention over the frames of a video."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from drl_jax.config import ModelConfig
from drl_jax.models.layers import Transformer, new_block_init

# The reference's heads use BERT's LayerNorm, whose epsilon is not CLIP's 1e-5.
_LN_EPS = 1e-12


class SequenceTransformer(nnx.Module):
    """seqTransf: position embeddings, CLIP-style blocks over the valid frames, and a residual."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.clip.text_width
        self.frame_position_embeddings = nnx.Embed(
            config.clip.context_length,
            width,
            embedding_init=normal(config.position_std),
            rngs=rngs,
        )
        self.transformer = Transformer(
            width,
            config.temporal_layers,
            config.clip.text_heads,
            eps=_LN_EPS,
            init=new_block_init(),
            unroll=config.scan_unroll,
            rngs=rngs,
        )

    def __call__(self, frame_feat: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """frame_feat [B, F, D], frame_mask bool [B, F] -> [B, F, D]."""
        positions = jnp.arange(frame_feat.shape[1])
        x = frame_feat + self.frame_position_embeddings(positions)
        # Keys only: a padded frame still gets an output, which later masks drop.
        return frame_feat + self.transformer(x, frame_mask[:, None, None, :])
