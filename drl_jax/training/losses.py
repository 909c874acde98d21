"""The training loss: a contrastive loss plus channel decorrelation (CDCR, section 3.3).

The contrastive loss is symmetric InfoNCE (`softmax_loss`) or SigLIP's (`sigmoid_loss`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from drl_jax.config import LossConfig
from drl_jax.models.interactions import Arrays, Interaction
from drl_jax.models.interactions.base import map_video_blocks


def total_loss(
    contrastive: jax.Array,
    text: Arrays,
    video: Arrays,
    key: jax.Array,
    *,
    interaction: Interaction,
    config: LossConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch of matched pairs.

    Args:
      contrastive: float32 scalar, the contrastive loss.
      text: the interaction's arrays of B texts.
      video: the interaction's arrays of the B videos that belong to them.
      key: for CDCR variants that draw rows at random.
      interaction: gives the channel correlation.
      config: CDCR variant and weights.

    Returns:
      The loss, and `loss`, `contrastive_loss` and `cdcr_loss` by name, float32 scalars.
    """
    cdcr = jnp.zeros(())
    if config.cdcr:
        correlation = interaction.channel_correlation(text, video, key, config.cdcr)
        cdcr = decorrelation_loss(correlation, config.cdcr_alpha1, config.cdcr_alpha2)
    loss = contrastive + config.cdcr_lambda * cdcr
    return loss, {"loss": loss, "contrastive_loss": contrastive, "cdcr_loss": cdcr}


def softmax_loss(logits: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
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

    Returns:
      float32 scalar.
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
