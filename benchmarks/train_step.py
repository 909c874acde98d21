"""Time, arithmetic rate and memory of one training step.

    python -m benchmarks.train_step --batch=4

Needs jax, flax, optax and numpy only. Prints one JSON object; `fraction_of_matmul` sets the step's
rate against that of a large matrix product measured in the same process.
"""

import argparse
import json
import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drl_jax.config import ClipConfig, LossConfig, ModelConfig, OptimConfig
from drl_jax.optim import make_optimizer
from drl_jax.sharding import make_layout
from drl_jax.state import create_state
from drl_jax.steps import make_train_step


def train_step_flops(config: ModelConfig, batch: int, frames: int, words: int) -> float:
    """Floating-point operations of one step: matrix products of the forward pass, three times.

    XLA's own count (`cost_analysis`) counts the body of a scan over layers once.
    """
    clip = config.clip
    patches = (clip.image_resolution // clip.vision_patch_size) ** 2

    def transformer(tokens: int, width: int, layers: int) -> float:
        projections = 2 * tokens * width * 12 * width
        attention = 2 * 2 * tokens * tokens * width
        return layers * (projections + attention)

    patch_embedding = 2 * patches * 3 * clip.vision_patch_size**2 * clip.vision_width
    projection = 2 * clip.vision_width * clip.embed_dim
    image = transformer(patches + 1, clip.vision_width, clip.vision_layers)
    text = transformer(words, clip.text_width, clip.text_layers)
    text += 2 * words * clip.text_width * clip.embed_dim
    temporal = transformer(frames, clip.text_width, config.temporal_layers)
    weights = 2 * (words + frames) * clip.embed_dim * (clip.embed_dim + 1)
    pair = frames * (image + patch_embedding + projection) + text + temporal + weights
    interaction = 2 * batch * batch * words * frames * clip.embed_dim
    return 3 * (batch * pair + interaction)


def matmul_rate(repeats: int = 5) -> float:
    """Floating-point operations a second of a large square float32 matrix product."""
    size = 3072 if jax.default_backend() == "cpu" else 16384
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def measure(config: ModelConfig, batch: int, frames: int, words: int, steps: int) -> dict[str, Any]:
    """Compiles and times the training step on random input."""
    layout = make_layout()
    tx = make_optimizer(OptimConfig(), total_steps=1000)
    state = create_state(config, tx, seed=0, layout=layout)
    rng = np.random.default_rng(0)
    size = config.clip.image_resolution
    arrays = {
        "text_ids": rng.integers(0, config.clip.vocab_size, (batch, words)).astype(np.int32),
        "text_mask": np.ones((batch, words), bool),
        "frames": rng.integers(0, 256, (batch, frames, size, size, 3)).astype(np.uint8),
        "frame_mask": np.ones((batch, frames), bool),
    }
    data = layout.put_rows(arrays)
    start = time.perf_counter()
    step = make_train_step(config, LossConfig(), tx, layout).lower(state, data).compile()
    compile_seconds = time.perf_counter() - start

    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, scalars = step(state, data)
        jax.block_until_ready((state, scalars))
        seconds.append(time.perf_counter() - start)
    step_seconds = statistics.median(seconds[1:])  # the first one warms up
    flops = train_step_flops(config, batch, frames, words)
    matmul = matmul_rate()
    return {
        "batch": batch,
        "frames": frames,
        "words": words,
        "step_seconds": round(step_seconds, 4),
        "pairs_per_second": round(batch / step_seconds, 3),
        "tflops_per_second": round(flops / step_seconds / 1e12, 4),
        "matmul_tflops_per_second": round(matmul / 1e12, 4),
        "fraction_of_matmul": round(flops / step_seconds / matmul, 3),
        "compile_seconds": round(compile_seconds, 1),
        "peak_memory_gb": round(_peak_memory() / 1e9, 2),
    }


def _peak_memory() -> int:
    """Bytes: the device's own count, or this process's resident memory where it has none."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after a warm-up")
    parser.add_argument("--scan_unroll", type=int, default=ModelConfig.scan_unroll)
    options = parser.parse_args()
    config = ModelConfig(clip=ClipConfig(), scan_unroll=options.scan_unroll)
    device = jax.devices()[0]
    result = {
        "benchmark": "train_step",
        "model": "ViT-B/32",
        "dtype": "float32",
        "scan_unroll": options.scan_unroll,
        "device": f"{jax.device_count()} x {device.device_kind}",
        "jax": jax.__version__,
        **measure(config, options.batch, options.frames, options.words, options.steps),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
