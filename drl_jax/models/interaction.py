"""Weighted token-wise interaction (WTI, section 3.2 of the paper).

A texts of L tokens, B videos of F frames, D channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal

from drl_jax.ops import l2_normalize, masked_softmax


class TokenWeight(nnx.Module):
    """The share that each token (or frame) has in its sentence (or video)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.fc_0 = nnx.Linear(width, width, kernel_init=normal(0.02), rngs=rngs)
        self.fc_1 = nnx.Linear(width, 1, kernel_init=normal(0.02), rngs=rngs)

    def __call__(self, feat: jax.Array, mask: jax.Array) -> jax.Array:
        """feat [B, L, D] *before* normalisation, mask bool [B, L] -> weights float32 [B, L]."""
        return masked_softmax(self.fc_1(jax.nn.relu(self.fc_0(feat)))[..., 0], mask)


def matched_token_similarity(
    text_feat: jax.Array, frame_feat: jax.Array, text_mask: jax.Array, frame_mask: jax.Array
) -> jax.Array:
    """Cosine of every token with every frame of its own video: [B,L,D], [B,F,D] -> [B,L,F]."""
    sim = jnp.einsum("bld,bfd->blf", l2_normalize(text_feat), l2_normalize(frame_feat))
    return sim * text_mask[:, :, None] * frame_mask[:, None, :]


def weighted_token_wise(
    text_feat: jax.Array,
    frame_feat: jax.Array,
    text_mask: jax.Array,
    frame_mask: jax.Array,
    text_weight: jax.Array,
    frame_weight: jax.Array,
) -> jax.Array:
    """Similarity of every text with every video.

    Each token looks for its best frame and each frame for its best token; the weights add up both.

    Args:
      text_feat: [A, L, D].
      frame_feat: [B, F, D].
      text_mask: bool [A, L].
      frame_mask: bool [B, F].
      text_weight: [A, L], sums to 1 over valid tokens.
      frame_weight: [B, F], sums to 1 over valid frames.

    Returns:
      sim_matrix float32 [A, B], in [-1, 1], without the temperature.
    """
    token_sim = jnp.einsum("ald,bfd->ablf", l2_normalize(text_feat), l2_normalize(frame_feat))
    # Multiplied, not set to -inf, as in the reference: where every valid similarity is negative,
    # the maximum is the 0 of the padding. Trained checkpoints depend on it.
    token_sim = token_sim * text_mask[:, None, :, None] * frame_mask[None, :, None, :]
    t2v = jnp.einsum("abl,al->ab", token_sim.max(axis=3), text_weight)
    v2t = jnp.einsum("abf,bf->ab", token_sim.max(axis=2), frame_weight)
    return (t2v + v2t) / 2
