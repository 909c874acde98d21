"""Exact search: latency by the size of the gallery, against memory bandwidth and arithmetic.

    python -m benchmarks.search [--sizes=1000,10000,100000,1000000] [--record]

Synthetic features of 12 frames x 512, as an index stores them, in memory-mapped pages; queries of
so many words, one at a time. A query cannot be faster than the bytes of the gallery divided by what
the machine reads in a second, nor than its products divided by what the machine multiplies in a
second; both are measured in the same process. Needs jax, flax and numpy only.
"""

import dataclasses
import mmap
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import arguments, matmul_rate, peak_memory, report, seconds
from drl_jax.config import ClipConfig, ModelConfig
from drl_jax.models.drl import init_params
from drl_jax.models.interaction import Features
from drl_jax.models.ops import l2_normalize
from drl_jax.search.engine import Gallery, SearchEngine
from drl_jax.search.store import stored_arrays
from drl_jax.sharding import make_layout

FRAMES, WIDTH, TOP = 12, 512, 10
# Different videos; a gallery repeats them, each time in memory of its own.
DISTINCT = 4096


def read_rate() -> float:
    """Bytes a second that the devices read of a large array."""
    x = jnp.ones(2**29, jnp.float32)
    return x.nbytes / seconds(jax.jit(jnp.sum), x, repeats=5)


def side(name: str, count: int, length: int, valid: np.ndarray) -> Features:
    """Unit features of `count` texts or videos, of which `valid` [count] words or frames count."""
    rng = np.random.default_rng(len(name))
    mask = np.arange(length) < valid[:, None]
    return {
        f"{name}_feat": np.asarray(l2_normalize(rng.normal(size=(count, length, WIDTH)))),
        f"{name}_mask": mask,
        f"{name}_weight": (mask / mask.sum(1, keepdims=True)).astype(np.float32),
    }


def repeated(array: np.ndarray, count: int) -> np.ndarray:
    """The rows of an array again and again, `count` in all, in pages as those of a mapped file."""
    pages = mmap.mmap(-1, count * array[:1].nbytes)
    rows = np.frombuffer(pages, array.dtype).reshape(count, *array.shape[1:])
    for start in range(0, count, len(array)):
        rows[start : start + len(array)] = array[: count - start]
    return rows


def measure(size: int, storage: str, words: int, limits: dict[str, float]) -> dict:
    small = ClipConfig(vision_layers=1, vision_width=64, text_layers=1, text_width=64, text_heads=2)
    config = ModelConfig(clip=dataclasses.replace(small, vocab_size=64), agg_module="none")
    engine = SearchEngine(config, init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    distinct = min(size, DISTINCT)
    video = side("frame", distinct, FRAMES, rng.integers(8, FRAMES + 1, distinct))
    stored = stored_arrays(video, storage)
    arrays = {name: repeated(array, size) for name, array in stored.items()}
    gallery = Gallery(arrays, range(size), make_layout())
    # As many words as are compared: those of the query, and one of padding.
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
    parser.add_argument("--sizes", default="1000,10000,100000,1000000", help="videos")
    parser.add_argument("--storages", default="bfloat16,int8", help="of the features")
    parser.add_argument("--words", default="8,16", help="of a query, with start and end")
    options = parser.parse_args()
    limits = {
        "read_bytes_per_second": round(read_rate()),
        "matmul_flops_per_second": round(matmul_rate()),
    }
    rows = [
        measure(size, storage, words, limits)
        for size in map(int, options.sizes.split(","))
        for storage in options.storages.split(",")
        for words in map(int, options.words.split(","))
    ]
    report(rows, options, **limits)


if __name__ == "__main__":
    main()
