"""Shared parts of the benchmark programs: flags, timing, matrix rates, peak memory, records.

Needs jax and numpy only.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from drl_jax.config import ModelConfig
from drl_jax.runtime.cli import Parser, positive_int
from drl_jax.runtime.files import write_json
from drl_jax.runtime.sharding import make_layout

RESULTS = Path(__file__).parent / "results"
# Rows and columns of the matrices that `matmul_rate` multiplies on a CPU.
MATMUL_SIZE_CPU = 3072


def arguments(name: str, description: str, *flags: tuple[str, Callable, Any, str]) -> Parser:
    """A parser with the flags of every benchmark program, and name, type, default and help of
    each flag of its own."""
    parser = Parser(f"python -m benchmarks.{name}", description=description.splitlines()[0])
    parser.add_argument(
        "--record", action="store_true", help="write benchmarks/results/NAME_DEVICE.json"
    )
    parser.add_argument("--name", default=name, help="NAME of the record (%(default)s)")
    for flag, kind, default, text in flags:
        parser.add_argument(f"--{flag}", type=kind, default=default, help=f"{text} (%(default)s)")
    return parser


def positive_ints(text: str) -> list[int]:
    """Argument type: whole numbers above 0, separated by commas."""
    return [positive_int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Argument type: names separated by commas."""
    return text.split(",")


def make_record(name: str, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """A benchmark's results, with the device, the versions of the packages and the date."""
    return {
        "benchmark": name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {
            package: importlib.metadata.version(package) for package in ("jax", "flax", "optax")
        },
        "date": datetime.date.today().isoformat(),
        **settings,
        "rows": rows,
    }


def report(rows: list[dict[str, Any]], options: argparse.Namespace, **settings: Any) -> None:
    """Prints the rows as a table and the record as JSON; writes the record with `--record`."""
    record = make_record(options.name, rows, **settings)
    print(table(rows), json.dumps(record), sep="\n")
    if options.record:
        device = re.sub(r"\W+", "_", jax.devices()[0].device_kind).lower()
        write_json(RESULTS / f"{options.name}_{device}.json", record)


def table(rows: list[dict[str, Any]]) -> str:
    """Formats rows with the same keys as aligned columns, without those that are dicts."""
    columns = [column for column, value in rows[0].items() if not isinstance(value, dict)]
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def seconds(function: Callable, *inputs: Any, repeats: int = 3) -> float:
    """Seconds of the fastest of several calls, after a warm-up call."""
    jax.block_until_ready(function(*inputs))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        taken.append(time.perf_counter() - start)
    return min(taken)


def step_columns(
    step: Callable[[], None], rate: Callable[[], float], flops: float, batch: int, steps: int
) -> dict[str, float]:
    """Times steps of `flops` each, and measures the `rate` of a matrix product, FLOP/s, after each.

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
    median = statistics.median(taken)
    return {
        "step_seconds": round(median, 4),
        "pairs_per_second": round(batch / median, 3),
        "tflops_per_second": round(flops / median / 1e12, 4),
        "matmul_tflops_per_second": round(statistics.median(rates) / 1e12, 4),
        "fraction_of_matmul": round(statistics.median(fractions), 3),
    }


def matmul_rate(dtype: str = "float32", repeats: int = 5) -> float:
    """Measured FLOP/s of the product of two large square matrices on one device."""
    size = MATMUL_SIZE_CPU if jax.default_backend() == "cpu" else 16384
    a = jnp.ones((size, size), ModelConfig(dtype=dtype).array_dtype)
    # XLA's CPU backend uses the processor's instructions for bfloat16 only with this result.
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    product = jax.jit(make_layout(jax.local_devices()[:1]).on_mesh(product, dtype))
    return 2 * size**3 / seconds(product, a, a, repeats=repeats)


def torch_matmul_rate(repeats: int = 5) -> float:
    """`matmul_rate` of PyTorch on the CPU, in float32."""
    import torch

    a = torch.ones(MATMUL_SIZE_CPU, MATMUL_SIZE_CPU)
    return 2 * MATMUL_SIZE_CPU**3 / seconds(torch.matmul, a, a, repeats=repeats)


def matmul_rates() -> dict[str, float]:
    """GFLOP/s of `matmul_rate` in float32; on a CPU also of PyTorch's, if that is installed."""
    rates = {"jax": matmul_rate()}
    if jax.default_backend() == "cpu" and importlib.util.find_spec("torch"):
        rates["pytorch"] = torch_matmul_rate()
    return {name: round(rate / 1e9, 1) for name, rate in rates.items()}


def peak_memory() -> int:
    """Peak bytes in use on the device; of this process on devices without memory statistics."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
