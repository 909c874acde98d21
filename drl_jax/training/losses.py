"""The paper's loss: symmetric InfoNCE and channel decorrelation (CDCR, section 3.3)."""

import jax
import jax.numpy as jnp

from drl_jax.models.ops import masked_standardize

Arrays = dict[str, jax.Array]


def contrastive_loss(logits: jax.Array) -> jax.Array:
    """Mean cross-entropy of both directions; text i belongs to video i.

    Args:
      logits: float32 [B, B], similarities times exp(logit_scale).

    Returns:
      float32 scalar.
    """
    # Of rows and of columns where they are: with rows on different devices, a transposition would
    # send the whole matrix around, and sums of columns send one number each.
    matched = jnp.sum(jnp.where(jnp.eye(len(logits), dtype=bool), logits, 0.0), axis=1)
    # Subtracted first: what is common to all logits then cancels in the gradient, too.
    t2v = jax.nn.logsumexp(logits - matched[:, None], axis=1)
    v2t = jax.nn.logsumexp(logits - matched[None, :], axis=0)
    return (t2v.mean() + v2t.mean()) / 2


def cdcr_loss(
    text: Arrays, video: Arrays, key: jax.Array, *, cdcr: int, alpha1: float, alpha2: float
) -> jax.Array:
    """Channel decorrelation of matched texts and videos.

    With c the cross-correlation of standardised channels of matched rows,
    alpha1 * sum_i (c_ii - 1)^2 + alpha2 * sum_{i != j} c_ij^2. What the rows are, is the variant:

    - dp, any: the sentence and the video vector of each pair.
    - ti and wti, 1: a random valid token and a random valid frame of each pair.
    - ti and wti, 2: every valid token with its most similar frame, and every valid frame with its
      most similar token; the mean of the two correlations.
    - wti, 3: the same, rows weighted by the interaction's weights.

    Args:
      text: the interaction's arrays of B texts; features are unit vectors.
      video: the interaction's arrays of the B videos that belong to them.
      key: for variant 1.
      cdcr: 1, 2 or 3 (the reference's `--cdcr`).
      alpha1: weight of the diagonal.
      alpha2: weight of the rest.

    Returns:
      float32 scalar, before `cdcr_lambda`.
    """
    if "sentence_feat" in text:
        correlation = _pooled_correlation(text["sentence_feat"], video["video_feat"])
    elif cdcr == 1:
        correlation = _pooled_correlation(*_random_positions(text, video, key))
    else:
        correlation = _matched_correlation(**text, **video, weighted=cdcr == 3)
    diagonal = jnp.diagonal(correlation)
    on_diagonal = jnp.sum((diagonal - 1) ** 2)
    off_diagonal = jnp.sum(correlation**2) - jnp.sum(diagonal**2)
    return alpha1 * on_diagonal + alpha2 * off_diagonal


def _pooled_correlation(text_rows: jax.Array, video_rows: jax.Array) -> jax.Array:
    """Mean over pairs of the outer product of standardised rows: [B, D], [B, D] -> [D, D]."""
    ones = jnp.ones(len(text_rows), jnp.float32)
    return _cross_correlation(text_rows, video_rows, ones > 0, ones / len(text_rows))


def _random_positions(text: Arrays, video: Arrays, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A valid token and a valid frame of each pair, drawn evenly: two of [B, D], unit rows."""

    def draw(feat, mask, key):
        logits = jnp.where(mask, 0.0, -jnp.inf)
        position = jax.random.categorical(key, logits, axis=1)
        return jnp.take_along_axis(feat, position[:, None, None], axis=1)[:, 0]

    text_key, video_key = jax.random.split(key)
    return (
        draw(text["text_feat"], text["text_mask"], text_key),
        draw(video["frame_feat"], video["frame_mask"], video_key),
    )


def _matched_correlation(
    text_feat: jax.Array,
    frame_feat: jax.Array,
    text_mask: jax.Array,
    frame_mask: jax.Array,
    text_weight: jax.Array,
    frame_weight: jax.Array,
    *,
    weighted: bool,
) -> jax.Array:
    """Correlation over tokens and their best frames, and frames and their best tokens: [D, D]."""
    pairs = text_feat.shape[0]
    # The partners of a pair are looked for in the pair alone: [B, L, F], masked as the interaction
    # masks (a padded position has similarity 0, and may be picked over negative ones).
    token_sim = jnp.einsum("bld,bfd->blf", text_feat, frame_feat)
    token_sim = token_sim * text_mask[:, :, None] * frame_mask[:, None, :]
    best_frame = jnp.argmax(token_sim, axis=2)[:, :, None]  # [B, L, 1]
    best_token = jnp.argmax(token_sim, axis=1)[:, :, None]  # [B, F, 1]
    if weighted:
        text_weight, frame_weight = text_weight / pairs, frame_weight / pairs
    else:
        text_weight = text_mask / jnp.sum(text_mask)
        frame_weight = frame_mask / jnp.sum(frame_mask)
    by_token = _cross_correlation(
        text_feat, jnp.take_along_axis(frame_feat, best_frame, axis=1), text_mask, text_weight
    )
    by_frame = _cross_correlation(
        frame_feat, jnp.take_along_axis(text_feat, best_token, axis=1), frame_mask, frame_weight
    )
    return (by_token + by_frame) / 2


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
