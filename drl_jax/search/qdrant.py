"""Candidates from a Qdrant server, for galleries beyond one machine.

A collection has a point for each window of an index: the vector that a scan compares, and with a
correction for hubs one more channel, -bias, which the 1 of a query reads. The id of a point is
derived from the path and the hash of its video and from its window. So a state of an index knows
its points, and an export sends and deletes only what differs.
"""

import contextlib
import functools
import hashlib
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from drl_jax.runtime.errors import UserError, one_line
from drl_jax.search.encoding import Correction
from drl_jax.search.engine import VECTORS
from drl_jax.search.open_index import OpenIndex
from drl_jax.search.segments import Segment

_NAMESPACE = uuid.UUID("6d1f0a64-5f0e-4c4e-9b56-4f3a3c6cf1d8")
# Points of a request that writes, and ids of one that reads.
_WRITTEN, _READ = 512, 10_000
# Points that a search of the graph keeps, for each candidate that it is asked for. Sentences lie
# apart from the videos that the graph links: in a million, 500 candidates have 97 % of the exact
# best ten with 10, and 99 % with 40.
_BREADTH = 40


class ExportReport(NamedTuple):
    """Windows that an export sent, deleted (a changed one is both), and found up to date."""

    sent: int
    deleted: int
    unchanged: int


class Qdrant:
    """The collections of a server, one for each model, folder of videos and correction.

    An instance is a `ranking.FindCandidates`.
    """

    def __init__(self, url: str, correction: Correction | None = None, client: Any = None):
        """Connects to a server, with its key in QDRANT_API_KEY, or takes a `QdrantClient`.

        Raises:
          UserError: qdrant_client is not installed, or the URL is none.
        """
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise UserError("Qdrant is not installed: pip install 'drl_jax[qdrant]'") from error
        if not (url or client):
            raise UserError("Qdrant needs the URL of a server: --url=http://HOST:6333")
        self._url, self._correction, self._models = url, correction, models
        key = os.environ.get("QDRANT_API_KEY") or None
        with self._errors():
            self._client = client or QdrantClient(
                url=url, api_key=key, timeout=60, check_compatibility=False
            )
        self._known = functools.lru_cache(maxsize=1)(self._read_known)
        # By directory and prefix of the segments of the last state.
        self._keys: dict[tuple[Path, str], np.ndarray] = {}
        self._warned: dict | None = None

    def collection(self, index: OpenIndex) -> str:
        """Name of the collection of an index."""
        key = f"{index.header['fingerprint']} {index.folder} int8"
        if self._correction is not None:
            key += f" {self._correction} {index.header['hubness']['sha256']}"
        return f"drl_jax_{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def export(self, index: OpenIndex) -> ExportReport:
        """Updates the collection of an index, which is made if there is none.

        After an interruption the same call continues. Queries are answered meanwhile.

        Raises:
          UserError: the server fails, or the index has no vectors.
        """
        if not index.model.interaction.HAS_VECTORS:
            interaction = index.model.config.model.interaction
            raise UserError(f"the interaction {interaction} has no vectors that Qdrant can compare")
        name, is_missing, deleted = self.collection(index), index.valid.copy(), 0
        biases = None if self._correction is None else index.biases(self._correction)
        with self._errors():
            if not self._client.collection_exists(name):
                width = index.model.config.model.backbone.embed_dim
                self._create(name, width + (biases is not None))
            for ids in self._stored(name):
                slots = self._slots(index, ids)
                is_missing[slots[slots >= 0]] = False
                if gone := [point for point, slot in zip(ids, slots, strict=True) if slot < 0]:
                    self._client.delete(name, gone)
                    deleted += len(gone)
            self._send(index, name, is_missing, biases)
        sent = int(is_missing.sum())
        return ExportReport(sent, deleted, int(index.valid.sum()) - sent)

    def _create(self, name: str, width: int) -> None:
        # The graph is searched with 8-bit copies in memory. No values are cut off: a few channels
        # of CLIP are much larger than the others.
        models = self._models
        copies = models.ScalarQuantizationConfig(type="int8", quantile=1.0, always_ram=True)
        vectors = models.VectorParams(
            size=width,
            distance="Dot",
            datatype="float16",
            on_disk=True,
            quantization_config=models.ScalarQuantization(scalar=copies),
        )
        self._client.create_collection(name, vectors_config=vectors)

    def _stored(self, name: str) -> Iterator[list[str]]:
        """The ids of all points, in parts; those of a part may be deleted."""
        offset = uuid.UUID(int=0).hex
        while offset is not None:
            points, offset = self._client.scroll(name, limit=_READ, offset=offset)
            yield [str(point.id) for point in points]

    def _send(
        self, index: OpenIndex, name: str, is_missing: np.ndarray, biases: np.ndarray | None
    ) -> None:
        """Sends the windows in some slots, bool [S]."""
        with tqdm(total=int(is_missing.sum()), desc="exporting", unit="window") as progress:
            for one in index.segments:
                segment, prefix, first = one.segment, one.prefix, one.first_slot
                last = first + int(segment.firsts["window"][-1])
                missing = np.flatnonzero(is_missing[first:last])
                for start in range(0, len(missing), _WRITTEN):
                    rows = missing[start : start + _WRITTEN]
                    units, scales = (segment.arrays[f"window.{n}"][rows] for n in VECTORS)
                    vectors = units * scales[:, None]
                    if biases is not None:
                        vectors = np.column_stack([vectors, -biases[first + rows]])
                    ids = [*_points(segment, prefix, rows)]
                    self._client.upsert(name, self._models.Batch(ids=ids, vectors=vectors.tolist()))
                    progress.update(len(rows))

    def check(self, index: OpenIndex) -> None:
        """Warns on stderr if the collection of an index does not have as many windows.

        Raises:
          UserError: the server fails, or there is no collection.
        """
        name, windows = self.collection(index), int(index.valid.sum())
        with self._errors():
            is_there = self._client.collection_exists(name)
            count = self._client.count(name).count if is_there else 0
        if not is_there:
            raise UserError(f"there is no collection {name} at {self._url}; {self._how(index)}")
        if count != windows:
            self._warn(index, f"has {count} windows, and the index {windows}")

    def __call__(self, index: OpenIndex, vectors: np.ndarray, count: int) -> list[np.ndarray]:
        """Finds windows; those that the index does not have are left out, with a line on stderr.

        Args:
          index: state of the index.
          vectors: float32 [Q, D] (`Interaction.query_vectors`).
          count: number of windows per query.

        Returns:
          int64 [k] for each query, their slots; k is at most `count`.

        Raises:
          UserError: the server fails, or finds no window of the index.
        """
        models, name = self._models, self.collection(index)
        if self._correction is not None:
            vectors = np.column_stack([vectors, np.ones(len(vectors), np.float32)])
        quantization = models.QuantizationSearchParams(rescore=False)  # Compared exactly anyway.
        params = models.SearchParams(hnsw_ef=_BREADTH * count, quantization=quantization)
        requests = [
            models.QueryRequest(query=vector, limit=count, params=params)
            for vector in vectors.tolist()
        ]
        with self._errors():
            answers = self._client.query_batch_points(name, requests)
        found = [self._slots(index, [str(p.id) for p in answer.points]) for answer in answers]
        if any((slots < 0).any() for slots in found):
            self._warn(index, "has windows that the index does not have")
        if any((slots < 0).all() for slots in found):
            raise UserError(f"no candidate of {name} is in the index; {self._how(index)}")
        return [slots[slots >= 0] for slots in found]

    def _warn(self, index: OpenIndex, what: str) -> None:
        """Prints a line, once for each state."""
        if self._warned != index.version:
            self._warned = index.version
            line = f"the collection {self.collection(index)} {what}; {self._how(index)}"
            print(line, file=sys.stderr)

    def _how(self, index: OpenIndex) -> str:
        command = f"python -m drl_jax.search export --index={index.directory} --url={self._url}"
        return f"make or update it with: {command}"

    def _slots(self, index: OpenIndex, ids: Sequence[str]) -> np.ndarray:
        """int64 [N], the slots of points; -1 for those that a state does not have."""
        known, slots = self._known(index)
        keys = _keys(ids)
        where = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[where] == keys, slots[where], -1)

    def _read_known(self, index: OpenIndex) -> tuple[np.ndarray, np.ndarray]:
        """The keys of the points that a state has, ascending, and their slots."""
        before, self._keys = self._keys, {}
        for one in index.segments:
            segment, prefix = one.segment, one.prefix
            name = (segment.directory, prefix)
            if (keys := before.get(name)) is None:
                rows = np.arange(segment.firsts["window"][-1])
                keys = _keys(_points(segment, prefix, rows))
            self._keys[name] = keys
        slots = np.flatnonzero(index.valid)
        keys = np.concatenate(list(self._keys.values()))[slots]
        order = np.argsort(keys)
        return keys[order], slots[order]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Reports errors of the client in one line."""
        from qdrant_client.http.exceptions import ApiException

        try:
            yield
        except (ApiException, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"Qdrant at {self._url}: {one_line(error)}") from error


def _points(segment: Segment, prefix: str, rows: np.ndarray) -> Iterator[str]:
    """The ids of the points of some windows of a segment."""
    owners = segment.row_of_window(rows)
    numbers = (rows - segment.firsts["window"][owners]).tolist()
    columns = (segment.table.column(name).take(owners).to_pylist() for name in ("path", "sha256"))
    for path, digest, number in zip(*columns, numbers, strict=True):
        yield str(uuid.uuid5(_NAMESPACE, f"{prefix}{path}\0{digest}\0{number}"))


def _keys(ids: Iterable[str]) -> np.ndarray:
    """uint64 [N], the first halves of ids."""
    return np.array([int(point.replace("-", "")[:16], 16) for point in ids], np.uint64)
