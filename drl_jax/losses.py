"""The paper's loss: symmetric InfoNCE and channel decorrelation (CDCR, section 3.3)."""

import jax
import jax.numpy as jnp
import optax

from drl_jax.ops import l2_normalize, masked_standardize


def contrastive_loss(logits: jax.Array) -> jax.Array:
    """Mean cross-entropy of both directions; text i belongs to video i.

    Args:
      logits: float32 [B, B], similarities times exp(logit_scale).

    Returns:
      float32 scalar.
    """
    labels = jnp.arange(logits.shape[0])
    t2v = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    v2t = optax.softmax_cross_entropy_with_integer_labels(logits.T, labels)
    return (t2v.mean() + v2t.mean()) / 2


def cdcr_loss(
    text_feat: jax.Array,
    frame_feat: jax.Array,
    text_mask: jax.Array,
    frame_mask: jax.Array,
    text_weight: jax.Array,
    frame_weight: jax.Array,
    token_sim: jax.Array,
    *,
    alpha1: float,
    alpha2: float,
) -> jax.Array:
    """Channel decorrelation over weighted, matched (token, frame) pairs (`--cdcr 3`).

    Every valid token is paired with its most similar frame and every valid frame with its most
    similar token; the two cross-correlations of standardised channels are averaged.

    Args:
      text_feat: [B, L, D].
      frame_feat: [B, F, D].
      text_mask: bool [B, L].
      frame_mask: bool [B, F].
      text_weight: [B, L], zero where masked.
      frame_weight: [B, F], zero where masked.
      token_sim: [B, L, F], masked similarity of matched pairs, which picks the partners.
      alpha1: weight of (c_ii - 1)^2.
      alpha2: weight of c_ij^2, i != j.

    Returns:
      float32 scalar, before `cdcr_lambda`.
    """
    batch = text_feat.shape[0]
    text_feat, frame_feat = l2_normalize(text_feat), l2_normalize(frame_feat)
    best_frame = jnp.argmax(token_sim, axis=2)[:, :, None]  # [B, L, 1]
    best_token = jnp.argmax(token_sim, axis=1)[:, :, None]  # [B, F, 1]
    by_token = _cross_correlation(
        text_feat, jnp.take_along_axis(frame_feat, best_frame, axis=1), text_mask, text_weight
    )
    by_frame = _cross_correlation(
        frame_feat, jnp.take_along_axis(text_feat, best_token, axis=1), frame_mask, frame_weight
    )
    correlation = (by_token + by_frame) / (2 * batch)
    diagonal = jnp.diagonal(correlation)
    on_diagonal = jnp.sum((diagonal - 1) ** 2)
    off_diagonal = jnp.sum(correlation**2) - jnp.sum(diagonal**2)
    return alpha1 * on_diagonal + alpha2 * off_diagonal


def _cross_correlation(
    own: jax.Array, partner: jax.Array, mask: jax.Array, weight: jax.Array
) -> jax.Array:
    """Weighted sum over valid rows of the outer product of standardised rows: -> [D, D].

    The reference builds an [N, D, D] tensor for it; the product of two matrices is the same sum.
    """
    channels = own.shape[-1]
    mask, weight = mask.reshape(-1), weight.reshape(-1)
    own = masked_standardize(own.reshape(-1, channels), mask)
    partner = masked_standardize(partner.reshape(-1, channels), mask)
    return jnp.einsum("nc,nd->cd", own * weight[:, None], partner)
