"""Masked selections and reductions, normalisation and correlation.

Masks are bool, True = valid. All functions compute in float32.
"""

import jax
import jax.numpy as jnp

# A channel whose standard deviation is below this fraction of its largest magnitude is constant up
# to float32 rounding.
_DEGENERATE_STD = 1e-6


def l2_normalize(x: jax.Array) -> jax.Array:
    """Divides the last axis by its L2 norm; a zero vector stays zero and has a zero gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def lengths_of(mask: jax.Array) -> jax.Array:
    """Lengths of rows whose valid positions come first: bool [B, T] -> int32 [B], at least 1."""
    return jnp.maximum(mask.sum(1, dtype=jnp.int32), 1)


def at_last_token(tokens: jax.Array, text_mask: jax.Array) -> jax.Array:
    """The feature of the last valid token (EOS): [B, L, D], bool [B, L] -> [B, D]."""
    last = jnp.sum(text_mask, axis=1) - 1
    return jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]


def random_valid(x: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
    """A valid position of each row, drawn uniformly: [B, L, D], bool [B, L] -> [B, D]."""
    position = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf), axis=1)
    return jnp.take_along_axis(x, position[:, None, None], axis=1)[:, 0]


def equal_weights(mask: jax.Array) -> jax.Array:
    """Weights of the valid positions of each row, which sum to 1: bool [B, L] -> [B, L]."""
    return mask / jnp.sum(mask, axis=1, keepdims=True)


def masked_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the valid positions of the last axis, at least one; exactly 0 at the others."""
    return jax.nn.softmax(jnp.where(mask, logits.astype(jnp.float32), -jnp.inf), axis=-1)


def mean_entropy(weights: jax.Array) -> jax.Array:
    """Mean over rows of the entropy of their weights, which sum to 1: [B, L] -> nats."""
    return jnp.mean(jnp.sum(jax.scipy.special.entr(weights), axis=-1))


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the valid positions of the second axis: [B, L, D], bool [B, L] -> [B, D]."""
    valid = mask[:, :, None].astype(jnp.float32)
    return jnp.sum(x * valid, axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1.0)


def masked_standardize(rows: jax.Array, mask: jax.Array) -> jax.Array:
    """(x - mean) / std of each channel over the valid rows, with the unbiased std.

    A channel that is constant over the valid rows becomes 0, and so does its gradient (the
    reference divides by zero and turns NaN): [N, D], bool [N] -> float32 [N, D], masked rows are 0.
    """
    rows = rows.astype(jnp.float32)
    valid = mask.astype(jnp.float32)[:, None]
    count = jnp.sum(valid)
    mean = jnp.sum(rows * valid, axis=0) / jnp.maximum(count, 1.0)
    centred = (rows - mean) * valid
    variance = jnp.sum(centred * centred, axis=0) / jnp.maximum(count - 1.0, 1.0)
    largest = jnp.max(jnp.abs(rows) * valid, axis=0)
    varies = variance > (_DEGENERATE_STD * largest) ** 2
    return jnp.where(varies, centred * jax.lax.rsqrt(jnp.where(varies, variance, 1.0)), 0.0)


def mean_outer_product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Mean over rows of the outer product of standardised rows: [B, D], [B, D] -> [D, D]."""
    ones = jnp.ones(len(left), jnp.float32)
    return weighted_outer_product(left, right, ones > 0, ones / len(left))


def weighted_outer_product(
    left: jax.Array, right: jax.Array, mask: jax.Array, weight: jax.Array
) -> jax.Array:
    """Weighted sum over valid rows of the outer product of standardised rows, float32 [D, D].

    The reference sums an [N, D, D] tensor; a matrix product gives the same sum. `left` and `right`
    are [..., D], `mask` and `weight` [...].
    """
    channels = left.shape[-1]
    mask, weight = mask.reshape(-1), weight.reshape(-1)  # [N]
    left = masked_standardize(left.reshape(-1, channels), mask)
    right = masked_standardize(right.reshape(-1, channels), mask)
    return jnp.einsum("nc,nd->cd", left * weight[:, None], right)
