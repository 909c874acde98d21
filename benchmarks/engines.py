"""Engines of candidates at scale: recall after exact comparison, latency, build, bytes, memory.

    python -m benchmarks.engines --videos=100000 --directory=DIR [--engines=scan,qdrant] [--record]

The gallery is that of `benchmarks.clustered`. The sentences are compared with all videos exactly;
an engine is asked for candidates, which are then compared exactly, and recall@10 is the share of
the exact best ten that is found. Collections stay in the directory: a second run measures the
queries again. Needs qdrant-edge-py, and lancedb for its engines.
"""

import dataclasses
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.clustered import make_clusters, make_gallery, make_sentences
from benchmarks.engine_builds import ENGINES, Engine
from benchmarks.measure import arguments, matmul_rate, names, positive_ints, report
from drl_jax.config import BackboneConfig, ModelConfig
from drl_jax.models.drl import init_params
from drl_jax.models.interactions import Features
from drl_jax.runtime.cli import positive_int
from drl_jax.search.engine import Gallery, SearchEngine
from drl_jax.sharding import make_layout

TOP = 10


@dataclasses.dataclass(frozen=True)
class Exact:
    """Exact search of a gallery, and its answers."""

    search: SearchEngine
    gallery: Gallery
    queries: list[Features]
    best: np.ndarray
    seconds: list[float]

    def among(self, query: Features, slots: np.ndarray) -> np.ndarray:
        """The slots of the best of some videos."""
        found = self.search.search(query, self.gallery.copied(slots), TOP)
        return slots[found.slots[0]]


def exact_search(arrays: Features, text: Features, videos: int, directory: Path) -> Exact:
    """Compares all sentences with all videos, and three of them one at a time for the latency."""
    small = BackboneConfig(
        vision_layers=1, vision_width=64, text_layers=1, text_width=64, text_heads=2
    )
    config = ModelConfig(backbone=dataclasses.replace(small, vocab_size=64), agg_module="none")
    search = SearchEngine(config, init_params(config, jax.random.key(0)))
    gallery = Gallery([arrays], np.arange(videos), make_layout())
    count = len(text["text_mask"])
    file = directory / f"exact_{count}.npy"
    if not file.exists():
        np.save(file, search.search(text, gallery, TOP).slots)
    queries = [{name: array[row : row + 1] for name, array in text.items()} for row in range(count)]
    seconds = [timed(lambda q=q: search.search(q, gallery, TOP))[0] for q in queries[:4]]
    return Exact(search, gallery, queries, np.load(file), seconds[1:])


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def measure(engine: Engine, exact: Exact, candidates: int) -> dict[str, float]:
    """Queries of one process, one after another, without the first ones."""
    times, found, before = [], 0, 0.0
    for number, query in enumerate([*exact.queries[:3], *exact.queries]):
        if number == 3:
            before = time.process_time()
        engine_seconds, slots = timed(lambda q=query: engine.query(q, candidates))
        seconds, best = timed(lambda q=query, s=slots: exact.among(q, s))
        if number >= 3:
            times.append((engine_seconds, seconds, engine_seconds + seconds))
            found += len(set(best.tolist()) & set(exact.best[number - 3].tolist()))
    engine_ms, rerank_ms, both_ms = 1e3 * np.array(times).T
    return {
        "candidates": candidates,
        "recall@10": round(100 * found / exact.best.size, 2),
        "engine_p50_ms": round(float(np.median(engine_ms)), 1),
        "rerank_p50_ms": round(float(np.median(rerank_ms)), 1),
        # Of a busy machine, the fastest queries say most about a quiet one.
        "p10_ms": round(float(np.percentile(both_ms, 10)), 1),
        "p50_ms": round(float(np.median(both_ms)), 1),
        "p95_ms": round(float(np.percentile(both_ms, 95)), 1),
        "cpu_ms": round(1e3 * (time.process_time() - before) / len(times), 1),
    }


def memory_gb(directory: Path) -> float:
    """Memory of this process: its own pages, and those of the mapped files of an engine."""
    own, mapped = 0, 0
    where = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            where = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) == 6 else ""
        elif line.startswith("Rss:") and where.startswith(str(directory)):
            mapped += int(line.split()[1])
        elif line.startswith("Anonymous:") and not where.startswith(str(directory)):
            own += int(line.split()[1])
    return (own + mapped) * 1024 / 1e9


def main() -> None:
    parser = arguments("engines", __doc__.splitlines()[0])
    parser.add_argument("--videos", type=positive_int, default=100_000)
    parser.add_argument("--directory", type=Path, required=True, help="for the data, 15 KB a video")
    parser.add_argument("--queries", type=positive_int, default=128)
    parser.add_argument(
        "--engines", type=names, default="scan,qdrant", help=f"of {', '.join(ENGINES)}"
    )
    parser.add_argument("--candidates", type=positive_ints, default="100,200,500,1000")
    options = parser.parse_args()
    directory = options.directory / str(options.videos)
    arrays = make_gallery(directory, options.videos)
    text, _ = make_sentences(make_clusters(0, options.videos), arrays, options.queries)
    exact = exact_search(arrays, text, options.videos, directory)
    rows = [
        {
            "engine": "exact",
            "gigabytes": round(exact.gallery.nbytes / 1e9, 2),
            "candidates": options.videos,
            "recall@10": 100.0,
            "p10_ms": round(1e3 * min(exact.seconds)),
            "p50_ms": round(1e3 * float(np.median(exact.seconds))),
        }
    ]
    for name in options.engines:
        place = directory / name
        before = memory_gb(place)
        engine = ENGINES[name](place)
        built = engine.build(arrays)
        some = [measure(engine, exact, count) for count in options.candidates]
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        common = {
            "engine": name,
            "gigabytes": round(size / 1e9, 2),
            "memory_growth_gb": round(memory_gb(place) - before, 2),
            **{part: round(seconds, 1) for part, seconds in built.items()},
        }
        rows += [common | row for row in some]
    columns = dict.fromkeys(column for row in rows for column in row)
    report(
        [{column: row.get(column, "") for column in columns} for row in rows],
        options,
        videos=options.videos,
        queries=options.queries,
        load_average=round(os.getloadavg()[0], 1),
        matmul_flops_per_second=round(matmul_rate()),
    )


if __name__ == "__main__":
    main()
