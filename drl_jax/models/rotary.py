"""Two-dimensional rotary position embedding, as Perception Encoder's image tower uses it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_THETA = 10_000.0


class Rotation(NamedTuple):
    """Cosines and sines of the angles of each position, float32 [T, D/K] each."""

    cos: np.ndarray
    sin: np.ndarray


def grid_rotation(grid: int, head_width: int) -> Rotation:
    """The rotation of a class token and the patches of a square grid.

    The first half of a head's channels turns with the column of a patch, the second half with its
    row. Rows and columns count from 1; the angle of the class token is 0.

    Args:
      grid: patches along one side.
      head_width: D/K, a multiple of 4.
    """
    half = head_width // 2
    frequencies = _THETA ** (-np.arange(0, half, 2) / half)  # [D/4K]
    # A frequency turns a pair of neighbouring channels.
    angles = np.repeat(np.arange(1, grid + 1)[:, None] * frequencies, 2, axis=1)  # [grid, D/2K]
    columns = np.broadcast_to(angles[None, :], (grid, grid, half))
    rows = np.broadcast_to(angles[:, None], (grid, grid, half))
    patches = np.concatenate([columns, rows], axis=2).reshape(-1, head_width)
    angles = np.concatenate([np.zeros((1, head_width)), patches])
    return Rotation(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns each pair of neighbouring channels (x0, x1) by the angle of its position.

    Args:
      x: queries or keys, [B, T, K, D/K].
      rotation: of T positions.

    Returns:
      [B, T, K, D/K] in the dtype of `x`; computed in float32.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    return (x * cos + turned * sin).astype(x.dtype)
