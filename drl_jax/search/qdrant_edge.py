"""A collection in Qdrant's own engine in this process, in a directory of the index.

An update works on a copy of the collection, `NAME.new`, which replaces it at the end: queries of
other processes go on meanwhile, and what a killed update has written is used by the next one.
"""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as qdrant

from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_json
from drl_jax.runtime.lock import locked
from drl_jax.search.candidate_engine import BREADTH, GRAPH_CANDIDATES, GRAPH_LINKS, Point
from drl_jax.search.edge_graph import build_graph

# Name of the file with the sizes of the others.
_SIZES = "sizes.json"
# Ids that are read at a time; updates after which what was written is safe.
_READ, _FLUSHED = 10_000, 32
# Kilobytes of vectors that are compared without a graph.
_WITHOUT_GRAPH = 10_000


class EdgeCollection:
    """See `CandidateEngine`. Safe to use from several threads.

    Attributes:
      where: directory of the collection.
      lock: the file that an update locks.
    """

    def __init__(self, directory: Path):
        """Opens nothing before it is used.

        Args:
          directory: of the collection.
        """
        self.where = str(directory)
        self.lock = directory.with_name(f"{directory.name}.lock")
        self._directory = directory
        self._shard: qdrant.EdgeShard | None = None
        self._inode = 0
        self._opening = threading.Lock()

    def exists(self) -> bool:
        return self._directory.is_dir()

    def count(self) -> int:
        with _errors(self._directory):
            return self._open().count(qdrant.CountRequest())

    def query(self, vector: np.ndarray, count: int) -> list[dict[str, Any]]:
        request = qdrant.QueryRequest(
            limit=count,
            query=qdrant.Query.Nearest(vector),
            with_payload=True,
            params=qdrant.SearchParams(
                hnsw_ef=BREADTH * count,
                # Candidates are compared exactly anyway.
                quantization=qdrant.QuantizationSearchParams(rescore=False),
            ),
        )
        with _errors(self._directory):
            return [point.payload for point in self._open().query(request)]

    def _open(self) -> qdrant.EdgeShard:
        """The collection, opened anew after an update."""
        with self._opening:
            inode = self._directory.stat().st_ino
            if self._shard is None or inode != self._inode:
                _check_sizes(self._directory)
                # Another thread may still ask the one before, which ends with its last query.
                self._shard, self._inode = qdrant.EdgeShard.load(self.where), inode
            return self._shard

    def close(self) -> None:
        with self._opening:
            shard, self._shard = self._shard, None
        if shard is not None:
            # An update may have replaced its files.
            with contextlib.suppress(Exception):
                shard.close()

    @contextlib.contextmanager
    def update(self, width: int) -> Iterator["EdgeUpdate"]:
        with contextlib.ExitStack() as lock:
            with _errors(self._directory):
                lock.enter_context(locked(self.lock, f"the collection in {self._directory}"))
                old = self._directory.with_name(f"{self._directory.name}.old")
                if old.exists() and not self.exists():
                    old.rename(self._directory)  # A killed update was about to replace it.
                shutil.rmtree(old, ignore_errors=True)
            update = EdgeUpdate(self._directory, width)
            try:
                yield update
            finally:
                update.close()
            if update.is_copy:
                build_graph(update.directory)
                with _errors(update.directory):
                    _write_sizes(update.directory)
                    if self.exists():
                        self._directory.rename(old)
                    update.directory.rename(self._directory)
                shutil.rmtree(old, ignore_errors=True)


class EdgeUpdate:
    """See `CollectionUpdate`.

    Attributes:
      directory: what is open: the collection, or its copy.
      is_copy: whether it is the copy.
    """

    def __init__(self, collection: Path, width: int):
        """Opens the copy of an interrupted update, or the collection, or an empty copy."""
        self._copy = collection.with_name(f"{collection.name}.new")
        self._updates = 0
        self._shard: qdrant.EdgeShard | None = None
        if self._copy.exists():
            try:
                self._load(self._copy)
                return
            except UserError:
                shutil.rmtree(self._copy)  # It was killed while it was made.
        if collection.exists():
            _check_sizes(collection)
            self._load(collection)
        else:
            self._create(width)

    @property
    def is_copy(self) -> bool:
        return self.directory == self._copy

    def _load(self, directory: Path) -> None:
        self.directory = directory
        with _errors(directory):
            self._shard = qdrant.EdgeShard.load(str(directory))

    def _create(self, width: int) -> None:
        self.directory = self._copy
        with _errors(self._copy):
            self._copy.mkdir(parents=True)
            self._shard = qdrant.EdgeShard.create(str(self._copy), _config(width))

    def _shard_of_copy(self) -> qdrant.EdgeShard:
        if not self.is_copy:
            self.close()
            with _errors(self._copy):
                # Under another name until it is whole.
                part = self._copy.with_suffix(".part")
                shutil.rmtree(part, ignore_errors=True)
                shutil.copytree(self.directory, part).rename(self._copy)
            self._load(self._copy)
        return self._shard

    def ids(self) -> set[str]:
        found, offset = set(), None
        with _errors(self.directory):
            while True:
                request = qdrant.ScrollRequest(offset=offset, limit=_READ, with_payload=False)
                points, offset = self._shard.scroll(request)
                found.update(str(point.id) for point in points)
                if offset is None:
                    return found

    def delete(self, ids: Sequence[str]) -> None:
        self._write(qdrant.UpdateOperation.delete_points(list(ids)))

    def upsert(self, points: Iterable[Point]) -> None:
        self._write(
            qdrant.UpdateOperation.upsert_points([qdrant.Point(*point) for point in points])
        )

    def _write(self, operation: qdrant.UpdateOperation) -> None:
        shard = self._shard_of_copy()
        with _errors(self.directory):
            shard.update(operation)
            self._updates += 1
            if self._updates % _FLUSHED == 0:
                shard.flush()

    def close(self) -> None:
        shard, self._shard = self._shard, None
        if shard is not None:
            with _errors(self.directory):
                shard.close()


def _config(width: int) -> qdrant.EdgeConfig:
    vectors = qdrant.EdgeVectorParams(
        width,
        qdrant.Distance.Dot,
        datatype=qdrant.VectorStorageDatatype.Float16,
        # The graph is built and searched with 8-bit copies in memory, a quarter of float32. No
        # values are cut off: a few channels of CLIP are much larger than the others.
        quantization_config=qdrant.ScalarQuantizationConfig(
            qdrant.ScalarType.Int8, quantile=1.0, memory=qdrant.Memory.Pinned
        ),
        memory=qdrant.Memory.Cold,
    )
    return qdrant.EdgeConfig(
        vectors,
        hnsw_config=qdrant.HnswIndexConfig(GRAPH_LINKS, GRAPH_CANDIDATES, _WITHOUT_GRAPH),
        # One graph, however large.
        optimizers=qdrant.EdgeOptimizersConfig(
            default_segment_number=1, max_segment_size=2**40, indexing_threshold=_WITHOUT_GRAPH
        ),
        # Its lock would keep other processes from reading. Updates are flushed instead.
        wal_enabled=False,
    )


def _sizes(directory: Path) -> dict[str, int]:
    return {
        str(path.relative_to(directory)): path.stat().st_size
        for path in directory.rglob("*")
        if path.is_file() and path.name != _SIZES
    }


def _write_sizes(directory: Path) -> None:
    """Stores the sizes of the files of a collection, which a first opening changes."""
    qdrant.EdgeShard.load(str(directory)).close()
    write_json(directory / _SIZES, _sizes(directory))


def _check_sizes(directory: Path) -> None:
    """Checks that no file is missing or cut: reading behind its end would end the process."""
    try:
        expected = json.loads((directory / _SIZES).read_text(encoding="utf-8"))
        sizes = _sizes(directory)
        is_whole = all(sizes.get(name, -1) >= size for name, size in expected.items())
    except (OSError, ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        raise _damaged(directory, "a file is missing or was cut")


def _damaged(directory: Path, reason: str) -> UserError:
    return UserError(f"Qdrant in {directory}: {reason}; delete this directory and export again")


@contextlib.contextmanager
def _errors(directory: Path) -> Iterator[None]:
    """Reports errors of the engine in one line; they have no class of their own."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except OSError as error:
        raise UserError(f"Qdrant in {directory}: {error.strerror or error}") from error
    except BaseException as error:  # A panic of the engine is no Exception.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _damaged(directory, reason) from error
