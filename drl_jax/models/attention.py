"""Multi-head attention, computed by XLA or by cuDNN, and rotary position embedding.

Shapes: B rows, Q queries, T positions, K heads, H channels of a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import get_abstract_mesh

from drl_jax.runtime.sharding import split_rows

# Head widths that cuDNN's kernel takes, forward and backward, on every GPU that has it.
_CUDNN_MULTIPLE, _CUDNN_MAX = 8, 128
# NVIDIA's Ampere and later have it.
_CUDNN_COMPUTE_CAPABILITY = (8, 0)
# Base of the wavelengths of a rotary embedding.
_THETA = 10_000.0


class AttentionMask(NamedTuple):
    """The keys that a query attends to; all of them by default.

    Attributes:
      causal: that of its own position and of earlier ones.
      lengths: int32 [B], at least 1: the first so many of each row.
    """

    causal: bool = False
    lengths: jax.Array | None = None


NO_MASK = AttentionMask()


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask = NO_MASK,
    implementation: str = "auto",
) -> jax.Array:
    """Multi-head attention, softmax(q k^T / sqrt(H)) v for each head.

    The softmax is float32 for every dtype of the inputs. cuDNN computes it on the devices of the
    current mesh (`Layout.on_mesh`); without one, XLA does.

    Args:
      q: [B, Q, K, H], as the result.
      k: [B, T, K, H], as `v`.
      implementation: one of ATTENTION in `config.py`.
    """
    causal, lengths = mask
    width = q.shape[-1]
    fits = width % _CUDNN_MULTIPLE == 0 and width <= _CUDNN_MAX and q.shape[1] == k.shape[1]
    if implementation == "auto" and fits and q.dtype == jnp.bfloat16 and _has_cudnn():
        return _attend_with_cudnn(q, k, v, causal, lengths)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="xla"
    )


def _attend_with_cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, lengths: jax.Array | None
) -> jax.Array:
    rows, positions, _, _ = q.shape
    if odd := positions % 2:
        # JAX refuses the gradient for an odd number of positions. No query looks at the new one.
        q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
        if lengths is None and not causal:
            lengths = jnp.full((rows,), positions, jnp.int32)
    # The kernel cannot be split in any other way; with fsdp, XLA otherwise tries to.
    q, k, v = map(split_rows, (q, k, v))
    attended = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return attended[:, :positions]


def _has_cudnn() -> bool:
    """Whether the devices of the current mesh are NVIDIA GPUs that have the kernel."""
    device = get_abstract_mesh().abstract_device
    if device is None or not device.device_kind.startswith("NVIDIA"):
        return False
    if jax.default_backend() != "gpu":
        return True  # The program is compiled for a GPU that this machine does not have.
    capability = jax.devices()[0].compute_capability.split(".")
    return tuple(map(int, capability)) >= _CUDNN_COMPUTE_CAPABILITY


class Rotation(NamedTuple):
    """Cosines and sines of the angles of each position, float32 [T, H] each."""

    cos: np.ndarray
    sin: np.ndarray


def grid_rotation(grid: int, head_width: int) -> Rotation:
    """The rotation of a class token and `grid` x `grid` patches, as in Perception Encoder.

    The first half of the H channels of a head, a multiple of 4, turns with the column of a patch,
    the second half with its row. Both count from 1; the angle of the class token is 0.
    """
    half = head_width // 2
    frequencies = _THETA ** (-np.arange(0, half, 2) / half)  # [H/4]
    # A frequency turns a pair of neighbouring channels.
    angles = np.repeat(np.arange(1, grid + 1)[:, None] * frequencies, 2, axis=1)  # [grid, H/2]
    columns = np.broadcast_to(angles[None, :], (grid, grid, half))
    rows = np.broadcast_to(angles[:, None], (grid, grid, half))
    patches = np.concatenate([columns, rows], axis=2).reshape(-1, head_width)  # [grid*grid, H]
    angles = np.concatenate([np.zeros((1, head_width)), patches])
    return Rotation(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns each pair of neighbouring channels (x0, x1) by the angle of its position.

    Queries or keys, [B, T, K, H] -> the same in their dtype; computed in float32.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)  # [B, T, K, H/2, 2]
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    cos, sin = (table[: x.shape[1], None] for table in rotation)
    return (x * cos + turned * sin).astype(x.dtype)
