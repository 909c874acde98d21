"""Images per second of the image tower of ViT-B/32 on a CPU: of JAX, and of OpenVINO.

    python -m benchmarks.cpu_encoders [--images=16] [--dtypes=float32,bfloat16] [--record]

The weights are random. Each repeat times both encoders and then a matrix product of the same dtype,
for other programs may slow the machine down at any time; all numbers are medians. `error` is the
largest difference of a channel of unit features to those of JAX in float32. Needs jax, flax, numpy,
tqdm and openvino.
"""

import dataclasses
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.measure import arguments, matmul_rate, names, positive_int, report
from drl_jax.config import ModelConfig
from drl_jax.evaluation.embedder import make_embed_steps
from drl_jax.evaluation.openvino_encoder import OpenVINOImages
from drl_jax.models.drl import Params, init_params
from drl_jax.runtime.sharding import make_layout

MODEL = ModelConfig(agg_module="none", interaction="dp")
Encode = Callable[[np.ndarray], np.ndarray]


def jax_images(model: ModelConfig, params: Params) -> Encode:
    """The image tower as JAX computes it, on one device."""
    layout = make_layout(jax.local_devices()[:1])
    step = make_embed_steps(model, layout).encode_image
    placed = jax.device_put(params, layout.replicated)

    def encode(images: np.ndarray) -> np.ndarray:
        return np.asarray(step(placed, images, np.ones(len(images), bool))["image_feat"])

    return encode


def first_seconds(encode: Encode, images: np.ndarray) -> float:
    """Seconds of the first call, which compiles."""
    start = time.perf_counter()
    encode(images)
    return time.perf_counter() - start


def measure(
    dtype: str, params: Params, images: np.ndarray, exact: np.ndarray, repeats: int
) -> dict[str, Any]:
    """Times both encoders in turns, after a first call of each."""
    model = dataclasses.replace(MODEL, dtype=dtype)
    encoders = {"jax": jax_images(model, params), "openvino": OpenVINOImages(model, params)}
    compiled = {name: first_seconds(encode, images) for name, encode in encoders.items()}
    taken: dict[str, list[float]] = {name: [] for name in encoders}
    rates = []
    for _ in range(repeats):
        for name, encode in encoders.items():
            start = time.perf_counter()
            encode(images)
            taken[name].append(time.perf_counter() - start)
        rates.append(matmul_rate(dtype, repeats=1))
    ratios = [ours / theirs for ours, theirs in zip(*taken.values(), strict=True)]
    row: dict[str, Any] = {"dtype": dtype, "images": len(images)}
    for name, encode in encoders.items():
        row[f"{name}_images_per_second"] = round(len(images) / statistics.median(taken[name]), 1)
        row[f"{name}_error"] = float(f"{np.abs(unit(encode(images)) - exact).max():.1e}")
        row[f"{name}_first_seconds"] = round(compiled[name], 1)
    row["speedup"] = round(statistics.median(ratios), 2)
    row["matmul_gflops"] = round(statistics.median(rates) / 1e9, 1)
    return row


def unit(features: np.ndarray) -> np.ndarray:
    """Unit features, [N, D]."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each dtype."""
    options = arguments(
        *("cpu_encoders", __doc__),
        ("images", positive_int, 16, "images that are encoded together"),
        ("dtypes", names, "float32,bfloat16", "dtypes, e.g. float32,bfloat16"),
        ("repeats", positive_int, 9, "timed calls of each encoder"),
    ).parse_args(argv)
    rng, size = np.random.default_rng(0), MODEL.backbone.image_resolution
    images = rng.integers(0, 256, (options.images, size, size, 3)).astype(np.uint8)
    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    exact = unit(jax_images(MODEL, params)(images))
    rows = [measure(dtype, params, images, exact, options.repeats) for dtype in options.dtypes]
    report(rows, options, openvino=importlib.metadata.version("openvino"))


if __name__ == "__main__":
    main()
