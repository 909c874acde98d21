"""Exact search: latency by gallery size, compared with memory bandwidth and arithmetic.

    python -m benchmarks.search [--sizes=1000,10000,100000,1000000] [--record]

Synthetic features of 12 frames x 512, as an index stores them, in memory-mapped pages; one query at
a time. Two lower bounds of the time of a query are measured in the same process: the bytes of the
gallery divided by the read bandwidth, and its products divided by the rate of matrix products.
Needs jax, flax and numpy only.
"""

import dataclasses
import mmap
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import (
    arguments,
    matmul_rate,
    names,
    peak_memory,
    positive_ints,
    report,
    seconds,
)
from drl_jax.config import BackboneConfig, ModelConfig
from drl_jax.models.drl import init_params
from drl_jax.models.interactions import Features
from drl_jax.models.ops import l2_normalize
from drl_jax.search import STORAGES
from drl_jax.search.engine import Gallery, SearchEngine
from drl_jax.search.quantization import quantize
from drl_jax.sharding import make_layout

FRAMES, WIDTH, TOP = 12, 512, 10
# Distinct videos; a gallery repeats them, each copy in its own memory.
DISTINCT = 4096


def read_rate() -> float:
    """Read bandwidth of the devices for a large array, bytes per second."""
    x = jnp.ones(2**29, jnp.float32)
    return x.nbytes / seconds(jax.jit(jnp.sum), x, repeats=5)


def side(name: str, count: int, length: int, valid: np.ndarray) -> Features:
    """Random unit features of `count` texts or videos with `valid` [count] tokens or frames."""
    rng = np.random.default_rng(len(name))
    mask = np.arange(length) < valid[:, None]
    return {
        f"{name}_unit": np.asarray(l2_normalize(rng.normal(size=(count, length, WIDTH)))),
        f"{name}_mask": mask,
        f"{name}_weight": (mask / mask.sum(1, keepdims=True)).astype(np.float32),
    }


def repeated(array: np.ndarray, count: int) -> np.ndarray:
    """Repeats the rows of an array to `count`, in anonymous memory-mapped pages."""
    pages = mmap.mmap(-1, count * array[:1].nbytes)
    rows = np.frombuffer(pages, array.dtype).reshape(count, *array.shape[1:])
    for start in range(0, count, len(array)):
        rows[start : start + len(array)] = array[: count - start]
    return rows


def measure(size: int, storage: str, words: int, limits: dict[str, float]) -> dict:
    small = BackboneConfig(
        vision_layers=1, vision_width=64, text_layers=1, text_width=64, text_heads=2
    )
    config = ModelConfig(backbone=dataclasses.replace(small, vocab_size=64), agg_module="none")
    engine = SearchEngine(config, init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    distinct = min(size, DISTINCT)
    video = side("frame", distinct, FRAMES, rng.integers(8, FRAMES + 1, distinct))
    stored = quantize(video, storage)
    arrays = {name: repeated(array, size) for name, array in stored.items()}
    gallery = Gallery([arrays], np.arange(size), make_layout())
    # The search compares the words of the query and one padded word.
    query = side("text", 1, 32, np.array([words - 1]))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        engine.search(query, gallery, TOP)
        times.append(time.perf_counter() - start)
    again = float(np.median(times[1:]))
    reading = gallery.nbytes / limits["read_bytes_per_second"]
    products = 2 * size * FRAMES * WIDTH * words / limits["matmul_flops_per_second"]
    return {
        "videos": size,
        "storage": storage,
        "words": words,
        "gigabytes": round(gallery.nbytes / 1e9, 3),
        "first_seconds": round(times[0], 3),
        "seconds": round(again, 4),
        "reading_limit": round(reading, 4),
        "products_limit": round(products, 4),
        "times_reading": round(again / reading, 2),
        "times_larger_limit": round(again / max(reading, products), 2),
        "peak_gb": round(peak_memory() / 1e9, 2),
    }


def main() -> None:
    parser = arguments("search", __doc__.splitlines()[0])
    parser.add_argument(
        "--sizes",
        type=positive_ints,
        default="1000,10000,100000,1000000",
        help="numbers of videos (%(default)s)",
    )
    parser.add_argument(
        "--storages",
        type=names,
        default=",".join(STORAGES[:2]),
        help="how features are stored (%(default)s)",
    )
    parser.add_argument(
        "--words",
        type=positive_ints,
        default="8,16",
        help="words of the query, with start and end (%(default)s)",
    )
    options = parser.parse_args()
    limits = {
        "read_bytes_per_second": round(read_rate()),
        "matmul_flops_per_second": round(matmul_rate()),
    }
    rows = [
        measure(size, storage, words, limits)
        for size in options.sizes
        for storage in options.storages
        for words in options.words
    ]
    report(rows, options, **limits)


if __name__ == "__main__":
    main()
