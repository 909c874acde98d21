"""The training loss: symmetric InfoNCE plus channel decorrelation (CDCR, section 3.3)."""

import jax
import jax.numpy as jnp

from drl_jax.config import LossConfig
from drl_jax.models.interactions import Arrays, Interaction


def total_loss(
    logits: jax.Array,
    text: Arrays,
    video: Arrays,
    key: jax.Array,
    *,
    interaction: Interaction,
    config: LossConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch of matched pairs.

    Args:
      logits: float32 [B, B], similarities times exp(logit_scale).
      text: the interaction's arrays of B texts.
      video: the interaction's arrays of the B videos that belong to them.
      key: for CDCR variants that draw rows at random.
      interaction: gives the channel correlation.
      config: CDCR variant and weights.

    Returns:
      The loss, and `loss`, `contrastive_loss` and `cdcr_loss` by name, float32 scalars.
    """
    contrastive = contrastive_loss(logits)
    cdcr = jnp.zeros(())
    if config.cdcr:
        correlation = interaction.channel_correlation(text, video, key, config.cdcr)
        cdcr = decorrelation_loss(correlation, config.cdcr_alpha1, config.cdcr_alpha2)
    loss = contrastive + config.cdcr_lambda * cdcr
    return loss, {"loss": loss, "contrastive_loss": contrastive, "cdcr_loss": cdcr}


def contrastive_loss(logits: jax.Array) -> jax.Array:
    """Mean cross-entropy of both directions; text i belongs to video i.

    Args:
      logits: float32 [B, B], similarities times exp(logit_scale).

    Returns:
      float32 scalar.
    """
    # Reduced over rows and over columns in place: with rows on different devices, a transposition
    # would move the whole matrix, and column sums move one number per column.
    matched = jnp.sum(jnp.where(jnp.eye(len(logits), dtype=bool), logits, 0.0), axis=1)
    # Subtracted first, so that what all logits have in common cancels in the gradient, too.
    t2v = jax.nn.logsumexp(logits - matched[:, None], axis=1)
    v2t = jax.nn.logsumexp(logits - matched[None, :], axis=0)
    return (t2v.mean() + v2t.mean()) / 2


def decorrelation_loss(correlation: jax.Array, alpha1: float, alpha2: float) -> jax.Array:
    """Penalty on a cross-correlation of channels: [D, D] -> scalar.

    alpha1 * sum_i (c_ii - 1)^2 + alpha2 * sum_{i != j} c_ij^2, before `cdcr_lambda`.
    """
    diagonal = jnp.diagonal(correlation)
    on_diagonal = jnp.sum((diagonal - 1) ** 2)
    off_diagonal = jnp.sum(correlation**2) - jnp.sum(diagonal**2)
    return alpha1 * on_diagonal + alpha2 * off_diagonal
