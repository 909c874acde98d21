"""Multi-head attention, computed by XLA or by cuDNN."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, get_abstract_mesh

from drl_jax.sharding import split_rows

# Head widths that cuDNN's kernel takes, forward and backward, on every GPU that has it.
_CUDNN_MULTIPLE, _CUDNN_MAX = 8, 128
# NVIDIA's Ampere and later have it.
_CUDNN_COMPUTE_CAPABILITY = (8, 0)


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
    """Multi-head attention, softmax(q k^T / sqrt(D)) v for each head.

    The softmax is float32 for every dtype of the inputs. cuDNN computes it on the devices of the
    current mesh (`Layout.on_mesh`); without one, XLA does.

    Args:
      q: [B, Q, K, D].
      k: [B, T, K, D].
      v: [B, T, K, D].
      mask: the keys that a query attends to.
      implementation: one of ATTENTION in `config.py`.

    Returns:
      [B, Q, K, D] in the dtype of `q`.
    """
    if implementation == "auto" and _fits_cudnn(q, k) and _has_cudnn(get_abstract_mesh()):
        return _attend_with_cudnn(q, k, v, mask)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=mask.causal,
        key_value_seq_lengths=mask.lengths,
        implementation="xla",
    )


def _attend_with_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
    rows, positions, _, _ = q.shape
    lengths = mask.lengths
    if odd := positions % 2:
        # JAX refuses the gradient for an odd number of positions. No query looks at the new one.
        q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
        if lengths is None and not mask.causal:
            lengths = jnp.full((rows,), positions, jnp.int32)
    # The kernel cannot be split in any other way; with fsdp, XLA otherwise tries to.
    attended = jax.nn.dot_product_attention(
        *map(split_rows, (q, k, v)),
        is_causal=mask.causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return attended[:, :positions]


def lengths_of(mask: jax.Array) -> jax.Array:
    """Lengths of rows whose valid positions come first: bool [B, T] -> int32 [B], at least 1."""
    return jnp.maximum(mask.sum(1, dtype=jnp.int32), 1)


def _fits_cudnn(q: jax.Array, k: jax.Array) -> bool:
    width = q.shape[-1]
    return (
        q.dtype == jnp.bfloat16
        and q.shape[1] == k.shape[1]
        and width % _CUDNN_MULTIPLE == 0
        and width <= _CUDNN_MAX
    )


def _has_cudnn(mesh: AbstractMesh) -> bool:
    """Whether the devices of a mesh are NVIDIA GPUs that have the kernel."""
    device = mesh.abstract_device
    if device is None or not device.device_kind.startswith("NVIDIA"):
        return False
    if jax.default_backend() != "gpu":
        return True  # The program is compiled for a GPU that this machine does not have.
    capability = jax.devices()[0].compute_capability.split(".")
    return tuple(map(int, capability)) >= _CUDNN_COMPUTE_CAPABILITY
