"""What the benchmarks share: time, memory, the machine's own matrix-product rate, records.

Needs jax and numpy only.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import platform
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

RESULTS = Path(__file__).parent / "results"


def arguments(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(f"benchmarks.{module}", description=description)
    parser.add_argument(
        "--record", action="store_true", help="write benchmarks/results/NAME_DEVICE.json"
    )
    parser.add_argument("--name", default=module, help="NAME of the record")
    return parser


def report(rows: list[dict[str, Any]], options: argparse.Namespace, **more: Any) -> None:
    """Prints a table of the rows and the whole record as JSON; `--record` writes it too."""
    device = jax.devices()[0]
    result = {
        "benchmark": options.name,
        "device": f"{jax.device_count()} x {device.device_kind}",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {
            package: importlib.metadata.version(package) for package in ("jax", "flax", "optax")
        },
        "date": datetime.date.today().isoformat(),
        **more,
        "rows": rows,
    }
    print(table(rows))
    print(json.dumps(result))
    if options.record:
        kind = re.sub(r"\W+", "_", device.device_kind).lower()
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{options.name}_{kind}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned columns."""
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def seconds(function: Callable, *inputs: Any, repeats: int = 3) -> float:
    """The shortest of some runs, after one that warms up."""
    jax.block_until_ready(function(*inputs))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        taken.append(time.perf_counter() - start)
    return min(taken)


@functools.cache
def matmul_rate(dtype: str = "float32") -> float:
    """Floating-point operations a second of a large square matrix product, here and now."""
    size = 3072 if jax.default_backend() == "cpu" else 16384
    a = jnp.ones((size, size), dtype)
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), a, a, repeats=5)


def peak_memory() -> int:
    """Bytes: the device's own count, or this process's resident memory where it has none."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
