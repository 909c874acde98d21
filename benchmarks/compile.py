"""Seconds to trace and compile the training step, without and with JAX's persistent cache.

    python -m benchmarks.compile [--record]

ViT-B/32, batch 4. Two processes use the same cache directory, which is empty at first. Needs jax,
flax, optax and numpy only.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax

from benchmarks.measure import arguments, report
from benchmarks.memory import compile_step
from drl_jax.config import ModelConfig
from drl_jax.sharding import make_layout


def compile_once() -> float:
    """Traces and compiles the step for one device; returns the seconds it took."""
    start = time.perf_counter()
    compile_step(ModelConfig(), 4, 0, make_layout(jax.devices()[:1]))
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles in two processes, or once in this one (`--once`)."""
    parser = arguments("compile", __doc__.splitlines()[0])
    parser.add_argument(
        "--once", action="store_true", help="compile in this process, print seconds"
    )
    options = parser.parse_args(argv)
    if options.once:
        print(compile_once())
        return
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for cache in ("cold", "persistent cache"):
            finished = subprocess.run(
                [sys.executable, "-m", "benchmarks.compile", "--once"],
                env={**os.environ, "JAX_COMPILATION_CACHE_DIR": directory},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            seconds = float(finished.stdout.splitlines()[-1])
            rows.append({"cache": cache, "trace_and_compile_seconds": round(seconds, 2)})
    report(rows, options)


if __name__ == "__main__":
    main()
