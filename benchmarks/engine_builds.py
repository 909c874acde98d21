"""The engines that `benchmarks.engines` measures: how each is built, and asked for candidates."""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.models.interactions.token_wise import TokenWise
from drl_jax.search.candidate_engine import BREADTH, Point
from drl_jax.search.quantization import quantize

BLOCK = 2048


class Engine(Protocol):
    """An engine of candidates in a directory."""

    def __init__(self, directory: Path): ...

    def build(self, arrays: Features) -> dict[str, float]:
        """Stores the videos, and opens them; returns the seconds of the parts of that."""

    def query(self, text: Features, count: int) -> np.ndarray:
        """Slots of candidates for a sentence, [1, ...] each: int64 [count]."""


def frames(arrays: Features) -> Iterator[tuple[int, Features]]:
    """Yields the first slot and the arrays of blocks of videos, features float32."""
    for start in range(0, len(arrays["frame_mask"]), BLOCK):
        part = {name: np.asarray(array[start : start + BLOCK]) for name, array in arrays.items()}
        part["frame_unit"] = (part["frame_unit"].astype(np.uint32) << 16).view(np.float32)
        yield start, part


@contextlib.contextmanager
def seconds_of(built: dict[str, float], part: str) -> Iterator[None]:
    """Adds the wall and CPU seconds of a block, with those of ended child processes."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    yield
    built[f"{part}_seconds"] = time.perf_counter() - start
    built[f"{part}_cpu_seconds"] = sum(os.times()[:4]) - before


class _Built:
    """An engine that keeps how long its parts took in its directory."""

    def __init__(self, directory: Path):
        self.directory = directory

    def build(self, arrays: Features) -> dict[str, float]:
        file = self.directory / "seconds.json"
        if not file.exists():
            built: dict[str, float] = {}
            self.directory.mkdir(parents=True, exist_ok=True)
            self._make(arrays, built)
            file.write_text(json.dumps(built))
        built = json.loads(file.read_text())
        with seconds_of(built, "open"):
            self._open()
        return built

    def _make(self, arrays: Features, built: dict[str, float]) -> None:
        raise NotImplementedError

    def _open(self) -> None:
        raise NotImplementedError


class Scan(_Built):
    """No engine: one 8-bit vector of each video is compared by XLA, on two threads."""

    def _make(self, arrays: Features, built: dict[str, float]) -> None:
        with seconds_of(built, "insert"):
            blocks = [
                quantize({"video_unit": TokenWise.video_vectors(part)}, "int8")
                for _, part in frames(arrays)
            ]
            for name in blocks[0]:
                np.save(self.directory / name, np.concatenate([block[name] for block in blocks]))

    def _open(self) -> None:
        rows = np.load(self.directory / "video_unit.npy", mmap_mode="r")
        scale = np.load(self.directory / "video_unit.scale.npy", mmap_mode="r")
        # Not padded: a block of the map is not copied.
        half = len(rows) // 2
        self._parts = [(rows[:half], scale[:half]), (rows[half:], scale[half:])]
        self._pool = ThreadPoolExecutor(2)
        self._compare = jax.jit(
            lambda rows, scale, q: (rows.astype(jnp.float32) * q).sum(1) * scale
        )

    def query(self, text: Features, count: int) -> np.ndarray:
        vector = TokenWise.query_vectors(text)[0]
        parts = self._pool.map(lambda part: np.asarray(self._compare(*part, vector)), self._parts)
        scores = np.concatenate(list(parts))
        return np.argpartition(-scores, count)[:count]


class Qdrant(_Built):
    """The collection of `python -m drl_jax.search export`."""

    def _make(self, arrays: Features, built: dict[str, float]) -> None:
        from drl_jax.search.qdrant_edge import EdgeCollection

        collection = EdgeCollection(self.directory / "collection")
        with contextlib.ExitStack() as stack:
            with seconds_of(built, "insert"):
                update = stack.enter_context(collection.update(512))
                for start, part in frames(arrays):
                    vectors = TokenWise.video_vectors(part)
                    update.upsert(
                        Point(
                            str(uuid.UUID(int=start + row)),
                            vector,
                            {"path": f"videos/{start + row}.mp4", "sha256": "0" * 64, "window": 0},
                        )
                        for row, vector in enumerate(vectors)
                    )
            # The graph is built when the block ends.
            with seconds_of(built, "index"):
                stack.close()

    def _open(self) -> None:
        from drl_jax.search.qdrant_edge import EdgeCollection

        self._collection = EdgeCollection(self.directory / "collection")
        self._collection.count()

    def query(self, text: Features, count: int) -> np.ndarray:
        found = self._collection.query(TokenWise.query_vectors(text)[0], count)
        return np.array([int(window["path"][7:-4]) for window in found])


class QdrantFrames(_Built):
    """Qdrant with all frames of a video in a point, ranked by MaxSim: half of the similarity."""

    def _make(self, arrays: Features, built: dict[str, float]) -> None:
        import qdrant_edge as qdrant

        config = qdrant.EdgeConfig(
            qdrant.EdgeVectorParams(
                512,
                qdrant.Distance.Dot,
                multivector_config=qdrant.MultiVectorConfig(qdrant.MultiVectorComparator.MaxSim),
                datatype=qdrant.VectorStorageDatatype.Float16,
                quantization_config=qdrant.ScalarQuantizationConfig(
                    qdrant.ScalarType.Int8, quantile=1.0, memory=qdrant.Memory.Pinned
                ),
            ),
            hnsw_config=qdrant.HnswIndexConfig(16, 100, 10_000),
            optimizers=qdrant.EdgeOptimizersConfig(
                default_segment_number=1, max_segment_size=2**40, indexing_threshold=10_000
            ),
            wal_enabled=False,
        )
        place = self.directory / "collection"
        place.mkdir()
        shard = qdrant.EdgeShard.create(str(place), config)
        with seconds_of(built, "insert"):
            for start, part in frames(arrays):
                points = [
                    qdrant.Point(start + row, unit[mask], {})
                    for row, (unit, mask) in enumerate(
                        zip(part["frame_unit"], part["frame_mask"], strict=True)
                    )
                ]
                shard.update(qdrant.UpdateOperation.upsert_points(points))
            shard.flush()
        with seconds_of(built, "index"):
            shard.optimize()
        shard.close()

    def _open(self) -> None:
        import qdrant_edge as qdrant

        self._shard = qdrant.EdgeShard.load(str(self.directory / "collection"))

    def query(self, text: Features, count: int) -> np.ndarray:
        import qdrant_edge as qdrant

        request = qdrant.QueryRequest(
            limit=count,
            query=qdrant.Query.Nearest(weighted_tokens(text)),
            params=qdrant.SearchParams(
                hnsw_ef=10 * count, quantization=qdrant.QuantizationSearchParams(rescore=False)
            ),
        )
        return np.array([point.id for point in self._shard.query(request)])


def weighted_tokens(text: Features) -> np.ndarray:
    """Tokens by their weights; their MaxSim is half of the similarity: float32 [L, D]."""
    weighted = text["text_unit"][0] * text["text_weight"][0][:, None]
    return weighted[text["text_mask"][0]]


class _Lance(_Built):
    """LanceDB with one vector of each video."""

    METRIC = "dot"

    def _vectors(self, part: Features) -> Any:
        import pyarrow as pa

        return pa.FixedSizeListArray.from_arrays(
            pa.array(TokenWise.video_vectors(part).ravel()), 512
        )

    def _index(self) -> Any:
        raise NotImplementedError

    def _make(self, arrays: Features, built: dict[str, float]) -> None:
        import lancedb
        import pyarrow as pa

        batches = (
            pa.record_batch(
                [pa.array(np.arange(start, start + len(part["frame_mask"]))), self._vectors(part)],
                names=["slot", "vector"],
            )
            for start, part in frames(arrays)
        )
        first = next(batches)

        def all_batches():
            yield first
            yield from batches

        with seconds_of(built, "insert"):
            reader = pa.RecordBatchReader.from_batches(first.schema, all_batches())
            table = lancedb.connect(self.directory).create_table("videos", reader)
        with seconds_of(built, "index"):
            table.create_index("vector", config=self._index())

    def _open(self) -> None:
        import lancedb

        self._table = lancedb.connect(self.directory).open_table("videos")

    def _query_of(self, text: Features) -> Any:
        return TokenWise.query_vectors(text)[0]

    def _search(self, text: Features, count: int) -> Any:
        search = self._table.search(self._query_of(text), vector_column_name="vector")
        return search.distance_type(self.METRIC).limit(count).select(["slot"])

    def query(self, text: Features, count: int) -> np.ndarray:
        return self._search(text, count).to_arrow()["slot"].to_numpy()


class LancePQ(_Lance):
    """Product quantization with 64 bytes a vector, of which 100 partitions are compared."""

    def _index(self) -> Any:
        from lancedb.index import IvfPq

        return IvfPq(distance_type=self.METRIC, num_sub_vectors=64)

    def _search(self, text: Features, count: int) -> Any:
        return super()._search(text, count).nprobes(100)


class LanceHNSW(_Lance):
    """A graph in each partition, over 8-bit vectors."""

    def _index(self) -> Any:
        from lancedb.index import HnswSq

        return HnswSq(distance_type=self.METRIC, m=16, ef_construction=100)

    def _search(self, text: Features, count: int) -> Any:
        return super()._search(text, count).nprobes(20).ef(BREADTH * count)


class LanceFrames(LancePQ):
    """Product quantization of all frames of a video, ranked by MaxSim of cosines."""

    METRIC = "cosine"

    def _vectors(self, part: Features) -> Any:
        import pyarrow as pa

        counts = part["frame_mask"].sum(axis=1)
        flat = part["frame_unit"][part["frame_mask"]]
        rows = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), 512)
        return pa.ListArray.from_arrays(
            pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)), rows
        )

    def _query_of(self, text: Features) -> Any:
        return weighted_tokens(text)


ENGINES: dict[str, type[Engine]] = {
    "scan": Scan,
    "qdrant": Qdrant,
    "qdrant_frames": QdrantFrames,
    "lance_pq": LancePQ,
    "lance_hnsw": LanceHNSW,
    "lance_frames": LanceFrames,
}
