"""Multi-head attention, computed by XLA or by cuDNN."""

import jax
import jax.numpy as jnp
from jax.lax import with_sharding_constraint
from jax.sharding import AbstractMesh, PartitionSpec, get_abstract_mesh

# Head widths that cuDNN's kernel takes, forward and backward, on every GPU that has it.
_CUDNN_MULTIPLE, _CUDNN_MAX = 8, 128
# NVIDIA's Ampere and later have it.
_CUDNN_COMPUTE_CAPABILITY = (8, 0)


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

    The softmax is float32 for every dtype of the inputs. cuDNN computes it on the devices of the
    current mesh (`Layout.on_mesh`); without one, XLA does.

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
    mesh = get_abstract_mesh()
    cudnn = implementation == "auto" and _fits_cudnn(q, k) and _has_cudnn(mesh)
    if cudnn:
        # The kernel cannot be split in any other way; with fsdp, XLA otherwise tries to.
        rows = PartitionSpec(mesh.axis_names[0])
        q, k, v = (with_sharding_constraint(x, rows) for x in (q, k, v))
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
