"""FLOPs of a training step, and the peak rates of devices: what model FLOPs utilisation needs."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from drl_jax.config import LossConfig, ModelConfig
from drl_jax.models.drl import param_shapes
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.train_step import EVERYTHING, make_gradient
from drl_jax.training.trainable import Trainable

_TERA = 1e12
# Peak rates of one device, FLOP/s, by `Device.device_kind` and `ModelConfig.dtype`: dense products
# on tensor cores, and of float32 without them, from NVIDIA's data sheets of the H100, H200, A100,
# L40S and L4.
_PEAK = {
    kind: {"bfloat16": bfloat16 * _TERA, "tf32": tf32 * _TERA, "float32": float32 * _TERA}
    for bfloat16, tf32, float32, kinds in (
        (989.5, 494.7, 66.9, ("NVIDIA H100 80GB HBM3", "NVIDIA H200")),
        (835.5, 417.5, 60.0, ("NVIDIA H100 NVL", "NVIDIA H200 NVL")),
        (756.5, 378.0, 51.2, ("NVIDIA H100 PCIe",)),
        (312.0, 156.0, 19.5, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB")),
        (312.0, 156.0, 19.5, ("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe")),
        (362.0, 183.0, 91.6, ("NVIDIA L40S",)),
        (121.0, 60.0, 30.3, ("NVIDIA L4",)),
    )
    for kind in kinds
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOP/s of one device, by `Device.device_kind` and `ModelConfig.dtype`; None: unknown."""
    return _PEAK.get(device_kind, {}).get(dtype)


def train_step_flops(
    model: ModelConfig,
    loss: LossConfig,
    batch_size: int,
    frames: int,
    words: int,
    trainable: Trainable = EVERYTHING,
    stored: bool = False,
) -> float:
    """FLOPs of the matrix products of a step's loss and gradient, over all devices.

    `stored`: the features of the towers are stored (`config.data.features`).

    Counted in the traced program, without anything that is computed again to save memory: the
    model FLOPs of "MFU" (arXiv 2204.02311, appendix B). XLA's own count, `cost_analysis`, is of
    the compiled program: it counts the body of a scan over layers once, what is computed again
    each time, and no kernels of other libraries.
    """
    # Nothing is computed again, and attention is visible as products.
    model = dataclasses.replace(model, remat="none", attention="xla", similarity_block=0)
    size = model.backbone.image_resolution
    shapes = {
        "text_ids": jax.ShapeDtypeStruct((batch_size, words), jnp.int32),
        "text_mask": jax.ShapeDtypeStruct((batch_size, words), jnp.bool_),
        "frames": jax.ShapeDtypeStruct((batch_size, frames, size, size, 3), jnp.uint8),
        "frame_mask": jax.ShapeDtypeStruct((batch_size, frames), jnp.bool_),
    }
    if stored:
        for name, rows in (("text_ids", 1 + words), ("frames", frames)):
            shape = (batch_size, rows, model.backbone.embed_dim)
            shapes[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    layout = make_layout(jax.local_devices()[:1])
    gradient = make_gradient(model, loss, layout, trainable)
    traced = jax.make_jaxpr(layout.on_mesh(gradient, model.dtype))(
        *jax.eval_shape(trainable.split, param_shapes(model)),
        shapes,
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    # The gradient of the pixels is traced, and nothing needs it.
    needed, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return _flops(needed)


def _flops(jaxpr: Jaxpr) -> float:
    """FLOPs of the matrix products in a program; those in a loop count once per iteration."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            summed = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * summed * math.prod(equation.outvars[0].aval.shape)
        iterations = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += iterations * sum(map(_flops, _programs(equation.params)))
    return total


def _programs(params: dict) -> Iterator[Jaxpr]:
    """The programs that an operation calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item
