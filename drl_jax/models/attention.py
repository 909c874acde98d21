"""Multi-head attention, computed by XLA or by cuDNN."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

# Head widths that cuDNN's kernel takes, forward and backward, on every GPU that has it.
_CUDNN_MULTIPLE, _CUDNN_MAX = 8, 128
# NVIDIA's Ampere and later have it.
_CUDNN_COMPUTE_CAPABILITY = (8, 0)

_compiled_for_cudnn: contextvars.ContextVar[bool | None] = contextvars.ContextVar(
    "compiled_for_cudnn", default=None
)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    lengths: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v for each head, over the keys that a query may attend to.

    The softmax is float32 for every dtype of the inputs.

    Args:
      q: [B, Q, K, D].
      k: [B, T, K, D].
      v: [B, T, K, D].
      causal: a query attends to its own position and earlier ones.
      lengths: int32 [B], at least 1: only the first so many keys are attended to. None: all.
      implementation: one of ATTENTION in `config.py`.

    Returns:
      [B, Q, K, D] in the dtype of `q`.
    """
    cudnn = implementation == "auto" and _fits_cudnn(q, k) and _has_cudnn()
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if cudnn else "xla",
    )


def lengths_of(mask: jax.Array) -> jax.Array:
    """Lengths of rows whose valid positions come first: bool [B, T] -> int32 [B], at least 1."""
    return jnp.maximum(mask.sum(1, dtype=jnp.int32), 1)


@contextlib.contextmanager
def compiled_for_cudnn() -> Iterator[None]:
    """Traces as on a GPU with cuDNN, to compile for a device that this machine does not have."""
    token = _compiled_for_cudnn.set(True)
    try:
        yield
    finally:
        _compiled_for_cudnn.reset(token)


def _fits_cudnn(q: jax.Array, k: jax.Array) -> bool:
    width = q.shape[-1]
    return (
        q.dtype == jnp.bfloat16
        and q.shape[1] == k.shape[1]
        and width % _CUDNN_MULTIPLE == 0
        and width <= _CUDNN_MAX
    )


def _has_cudnn() -> bool:
    """Whether the default device is an NVIDIA GPU whose cuDNN has the kernel."""
    if (forced := _compiled_for_cudnn.get()) is not None:
        return forced
    if jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version.lower():
        return False  # AMD's.
    capability = tuple(int(part) for part in device.compute_capability.split("."))
    return capability >= _CUDNN_COMPUTE_CAPABILITY
