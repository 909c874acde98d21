"""Time, FLOP/s and memory of one training step.

    python -m benchmarks.train_step [--models=32,16] [--dtypes=float32,bfloat16] [--batches=4,8]
    python -m benchmarks.train_step --models=shapes --batches=96 --frames=4 --words=24

`fraction_of_matmul` is the step's FLOP/s divided by that of a large matrix product of the same
dtype, which is measured after every step, for other programs may slow the machine down at any time:
the median of these ratios. `peak_memory_gb` is the peak of the process, including earlier rows.
Needs jax, flax, optax and numpy only; the model `shapes` also needs ml_collections.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.measure import (
    arguments,
    matmul_rate,
    names,
    peak_memory,
    positive_int,
    positive_ints,
    report,
)
from drl_jax.config import REMAT, BackboneConfig, LossConfig, ModelConfig, OptimConfig
from drl_jax.runtime.allocator import keep_freed_memory
from drl_jax.runtime.cli import Parser
from drl_jax.sharding import make_layout
from drl_jax.training.flops import train_step_flops
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.state import create_state
from drl_jax.training.train_step import make_train_step
from drl_jax.weights.releases import PUBLISHED


def backbones(text: str) -> dict[str, BackboneConfig]:
    """Parses `--models`: `shapes`, patch sizes of ViT-B and names of published towers."""
    found = {}
    for model in names(text):
        if model == "shapes":
            from data_prep.dataset_config import SHAPES_BACKBONE

            found[model] = SHAPES_BACKBONE
        elif model in PUBLISHED:
            found[model] = PUBLISHED[model].backbone
        else:
            found[f"ViT-B/{model}"] = BackboneConfig(vision_patch_size=positive_int(model))
    return found


def step_columns(
    step: Callable[[], None],
    rate: Callable[[], float],
    flops: float,
    batch: int,
    steps: int,
) -> dict[str, float]:
    """Times steps, and measures the matrix product after each of them.

    Args:
      step: runs a step to its end.
      rate: measures the FLOP/s of a matrix product.
      flops: of a step.
      batch: pairs of a step.
      steps: their number, after a warm-up.

    Returns:
      Medians, as columns of the table.
    """
    taken, rates = [], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
        rates.append(rate())
    taken, rates = taken[1:], rates[1:]  # The first step is the warm-up.
    fractions = [flops / seconds / rate for seconds, rate in zip(taken, rates, strict=True)]
    seconds = statistics.median(taken)
    return {
        "step_seconds": round(seconds, 4),
        "pairs_per_second": round(batch / seconds, 3),
        "tflops_per_second": round(flops / seconds / 1e12, 4),
        "matmul_tflops_per_second": round(statistics.median(rates) / 1e12, 4),
        "fraction_of_matmul": round(statistics.median(fractions), 3),
    }


def add_step_arguments(parser: Parser) -> None:
    """Adds the flags of the batches and of the number of steps."""
    parser.add_argument(
        "--batches",
        type=positive_ints,
        default="4",
        help="pairs of the global batch, e.g. 4,8 (%(default)s)",
    )
    parser.add_argument(
        "--frames", type=positive_int, default=12, help="frames per video (%(default)s)"
    )
    parser.add_argument(
        "--words", type=positive_int, default=32, help="tokens per text (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=positive_int, default=5, help="timed steps, after a warm-up (%(default)s)"
    )


def measure(
    name: str,
    config: ModelConfig,
    batch: int,
    frames: int,
    words: int,
    steps: int,
    microbatch: int,
) -> dict[str, Any]:
    """Compiles and times the training step on random input.

    Args:
      name: of the model, for the table.
      config: the model.
      batch: pairs of the global batch.
      frames: frames per video.
      words: tokens per text.
      steps: timed steps.
      microbatch: pairs encoded at a time; 0: all.
    """
    layout = make_layout()
    tx = make_optimizer(OptimConfig(), total_steps=1000)
    state = create_state(config, tx, seed=0, layout=layout)
    rng = np.random.default_rng(0)
    size = config.backbone.image_resolution
    arrays = {
        "text_ids": rng.integers(0, config.backbone.vocab_size, (batch, words)).astype(np.int32),
        "text_mask": np.ones((batch, words), bool),
        "frames": rng.integers(0, 256, (batch, frames, size, size, 3)).astype(np.uint8),
        "frame_mask": np.ones((batch, frames), bool),
    }
    data = layout.put_batch(arrays)
    start = time.perf_counter()
    step = make_train_step(config, LossConfig(), tx, layout, microbatch=microbatch)
    step = step.lower(state, data).compile()
    compile_seconds = time.perf_counter() - start

    def run() -> None:
        nonlocal state
        state, scalars = step(state, data)
        jax.block_until_ready((state, scalars))

    columns = step_columns(
        run,
        lambda: matmul_rate(config.dtype, repeats=2) * jax.device_count(),
        train_step_flops(config, LossConfig(), batch, frames, words),
        batch,
        steps,
    )
    return {
        "model": name,
        "dtype": config.dtype,
        "batch": batch,
        "microbatch": microbatch,
        "remat": config.remat,
        **columns,
        "compile_seconds": round(compile_seconds, 1),
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each combination of model, dtype and batch."""
    parser = arguments("train_step", __doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        type=backbones,
        default="32",
        help="patch sizes of ViT-B (32,16), shapes (the model of configs/shapes.py), and names of"
        f" published towers ({', '.join(PUBLISHED)}) (%(default)s)",
    )
    parser.add_argument(
        "--dtypes",
        type=names,
        default="float32",
        help="dtypes, e.g. float32,bfloat16 (%(default)s)",
    )
    add_step_arguments(parser)
    parser.add_argument(
        "--microbatch", type=int, default=0, help="pairs encoded at a time; 0: all (%(default)s)"
    )
    parser.add_argument(
        "--remat",
        type=names,
        default=ModelConfig.remat,
        help=f"of {', '.join(REMAT)}, e.g. none,dots (%(default)s)",
    )
    parser.add_argument(
        "--scan_unroll",
        type=positive_int,
        default=ModelConfig.scan_unroll,
        help="layers per iteration of the scan (%(default)s)",
    )
    parser.add_argument(
        "--default_allocator",
        action="store_true",
        help="return freed memory to the kernel, which training on the CPU does not",
    )
    options = parser.parse_args(argv)
    if not options.default_allocator:
        keep_freed_memory()
    rows = []
    for name, dtype, batch, remat in itertools.product(
        options.models, options.dtypes, options.batches, options.remat
    ):
        config = ModelConfig(
            backbone=options.models[name],
            dtype=dtype,
            remat=remat,
            scan_unroll=options.scan_unroll,
        )
        microbatch = options.microbatch if options.microbatch < batch else 0
        sizes = (batch, options.frames, options.words)
        rows.append(measure(name, config, *sizes, options.steps, microbatch))
    names_of_settings = ("frames", "words", "scan_unroll", "default_allocator")
    settings = {name: getattr(options, name) for name in names_of_settings}
    report(rows, options, **settings)


if __name__ == "__main__":
    main()
