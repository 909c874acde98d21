"""Time, arithmetic rate and memory of one training step.

    python -m benchmarks.train_step [--models=32,16] [--dtypes=float32,bfloat16] [--batches=4,8]

Needs jax, flax, optax and numpy only. `fraction_of_matmul` sets the step's rate against that of a
large matrix product of the same dtype in the same process; of several rows, `peak_memory_gb` is the
peak so far.
"""

import itertools
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks.measure import arguments, matmul_rate, peak_memory, report
from drl_jax.config import ClipConfig, LossConfig, ModelConfig, OptimConfig
from drl_jax.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.state import create_state
from drl_jax.training.train_step import make_train_step


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


def measure(
    config: ModelConfig, batch: int, frames: int, words: int, steps: int, microbatch: int
) -> dict[str, Any]:
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
    step = make_train_step(config, LossConfig(), tx, layout, microbatch=microbatch)
    step = step.lower(state, data).compile()
    compile_seconds = time.perf_counter() - start

    taken = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, scalars = step(state, data)
        jax.block_until_ready((state, scalars))
        taken.append(time.perf_counter() - start)
    step_seconds = statistics.median(taken[1:])  # the first one warms up
    flops = train_step_flops(config, batch, frames, words)
    matmul = matmul_rate(config.dtype) * jax.device_count()
    return {
        "model": f"ViT-B/{config.clip.vision_patch_size}",
        "dtype": config.dtype,
        "batch": batch,
        "microbatch": microbatch,
        "remat": config.remat,
        "step_seconds": round(step_seconds, 4),
        "pairs_per_second": round(batch / step_seconds, 3),
        "tflops_per_second": round(flops / step_seconds / 1e12, 4),
        "matmul_tflops_per_second": round(matmul / 1e12, 4),
        "fraction_of_matmul": round(flops / step_seconds / matmul, 3),
        "compile_seconds": round(compile_seconds, 1),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
    }


def main() -> None:
    parser = arguments("train_step", __doc__.splitlines()[0])
    parser.add_argument("--models", default="32", help="patch sizes of ViT-B: 32, 16 or 32,16")
    parser.add_argument("--dtypes", default="float32", help="float32, bfloat16 or both")
    parser.add_argument("--batches", default="4", help="pairs; several are a sweep")
    parser.add_argument("--microbatch", type=int, default=0)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after a warm-up")
    parser.add_argument("--scan_unroll", type=int, default=ModelConfig.scan_unroll)
    options = parser.parse_args()
    rows = []
    for patch, dtype, batch in itertools.product(
        options.models.split(","), options.dtypes.split(","), options.batches.split(",")
    ):
        config = ModelConfig(
            clip=ClipConfig(vision_patch_size=int(patch)),
            dtype=dtype,
            remat=options.remat,
            scan_unroll=options.scan_unroll,
        )
        microbatch = options.microbatch if options.microbatch < int(batch) else 0
        rows.append(
            measure(config, int(batch), options.frames, options.words, options.steps, microbatch)
        )
    settings = {name: getattr(options, name) for name in ("frames", "words", "scan_unroll")}
    report(rows, options, **settings)


if __name__ == "__main__":
    main()
