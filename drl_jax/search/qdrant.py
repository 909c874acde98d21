"""Candidates from a Qdrant server, for galleries beyond one machine.

A collection has a point for each window of an index: the vector that a scan compares, and with a
correction for hubs one more channel, -bias, which the 1 of a query reads. The id of a point is a
hash of the path and the hash of its video and of its window. So a state of an index knows its
points, and an export sends and deletes only what differs.
"""

import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from drl_jax.runtime.errors import UserError, one_line
from drl_jax.search.encoding import Correction
from drl_jax.search.engine import VECTORS
from drl_jax.search.open_index import OpenIndex
from drl_jax.search.segments import Segment

# Points of a request that writes, and ids of one that reads.
_WRITTEN, _READ = 512, 10_000
# Points that a search of the graph keeps, for each candidate that it is asked for. Sentences lie
# apart from the videos that the graph links: in a million, 500 candidates have 97 % of the exact
# best ten with 10, and 99 % with 40.
_BREADTH = 40


class Qdrant:
    """The collections of a server, one for each model, folder of videos and correction."""

    def __init__(self, url: str, correction: Correction | None = None, client: Any = None):
        """Connects to a server, with its key in QDRANT_API_KEY, or takes a `QdrantClient`."""
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise UserError("Qdrant is not installed: pip install 'drl_jax[qdrant]'") from error
        if not (url or client):
            raise UserError("Qdrant needs the URL of a server: --url=http://HOST:6333")
        self._url, self._correction, self._models = url, correction, models
        options = {"api_key": os.environ.get("QDRANT_API_KEY") or None, "timeout": 60}
        with self._errors():
            self._client = client or QdrantClient(url=url, check_compatibility=False, **options)
        self._known = functools.lru_cache(maxsize=1)(self._read_known)
        # Of the last state, by segment and what its paths begin with.
        self._ids: dict[tuple[Segment, str], np.ndarray] = {}
        self._warned: dict | None = None

    def collection(self, index: OpenIndex) -> str:
        key = f"{index.header['fingerprint']} {index.folder} int8, whole ids"
        if self._correction is not None:
            key += f" {self._correction} {index.header['hubness']['sha256']}"
        return f"drl_jax_{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def export(self, index: OpenIndex) -> tuple[int, int, int]:
        """Makes or updates a collection; returns numbers of windows: sent, deleted, unchanged."""
        if not index.model.interaction.HAS_VECTORS:
            interaction = index.model.config.model.interaction
            raise UserError(f"the interaction {interaction} has no vectors that Qdrant can compare")
        name, is_missing, deleted = self.collection(index), index.valid.copy(), 0
        with self._errors():
            if not self._client.collection_exists(name):
                self._create(name, index.model.config.model.backbone.embed_dim)
            offset = 0
            while offset is not None:
                points, offset = self._client.scroll(name, limit=_READ, offset=offset)
                slots = self._slots(index, points)
                is_missing[slots[slots >= 0]] = False
                if gone := [points[row].id for row in np.flatnonzero(slots < 0)]:
                    self._client.delete(name, gone)
                    deleted += len(gone)
            self._send(index, name, is_missing)
        sent = int(is_missing.sum())
        return sent, deleted, int(index.valid.sum()) - sent

    def _create(self, name: str, width: int) -> None:
        # The graph is searched with 8-bit copies in memory. No values are cut off: a few channels
        # of CLIP are much larger than the others.
        models, size = self._models, width + (self._correction is not None)
        copies = models.ScalarQuantizationConfig(type="int8", quantile=1.0, always_ram=True)
        copies = models.ScalarQuantization(scalar=copies)
        how = {"datatype": "float16", "on_disk": True, "quantization_config": copies}
        vectors = models.VectorParams(size=size, distance="Dot", **how)
        self._client.create_collection(name, vectors_config=vectors)

    def _send(self, index: OpenIndex, name: str, is_missing: np.ndarray) -> None:
        biases = None if self._correction is None else index.biases(self._correction)
        with tqdm(total=int(is_missing.sum()), desc="exporting", unit="window") as progress:
            for one in index.segments:
                segment, first = one.segment, one.first_slot
                missing = np.flatnonzero(is_missing[first : first + segment.window_count])
                for start in range(0, len(missing), _WRITTEN):
                    rows = missing[start : start + _WRITTEN]
                    units, scales = (segment.arrays[f"window.{n}"][rows] for n in VECTORS)
                    vectors = units * scales[:, None]
                    if biases is not None:
                        vectors = np.column_stack([vectors, -biases[first + rows]])
                    ids = self._ids[segment, one.prefix][rows].tolist()
                    self._client.upsert(name, self._models.Batch(ids=ids, vectors=vectors.tolist()))
                    progress.update(len(rows))

    def check(self, index: OpenIndex) -> None:
        """Warns on stderr if the collection of an index, which has to exist, has fewer or more."""
        name, windows = self.collection(index), int(index.valid.sum())
        with self._errors():
            if not self._client.collection_exists(name):
                raise UserError(f"there is no collection {name} at {self._url}; {self._how(index)}")
            count = self._client.count(name).count
        if count != windows:
            self._warn(index, f"has {count} windows, and the index {windows}")

    def __call__(self, index: OpenIndex, vectors: np.ndarray, count: int) -> list[np.ndarray]:
        """As `FindCandidates`; leaves out windows that the index lacks, and says so on stderr."""
        models, name = self._models, self.collection(index)
        if self._correction is not None:
            vectors = np.column_stack([vectors, np.ones(len(vectors), np.float32)])
        quantization = models.QuantizationSearchParams(rescore=False)  # Compared exactly anyway.
        params = models.SearchParams(hnsw_ef=_BREADTH * count, quantization=quantization)
        request = functools.partial(models.QueryRequest, limit=count, params=params)
        with self._errors():
            requests = [request(query=vector) for vector in vectors.tolist()]
            answers = self._client.query_batch_points(name, requests)
        found = [self._slots(index, answer.points) for answer in answers]
        if any((slots < 0).any() for slots in found):
            self._warn(index, "has windows that the index does not have")
        if any((slots < 0).all() for slots in found):
            raise UserError(f"no candidate of {name} is in the index; {self._how(index)}")
        return [slots[slots >= 0] for slots in found]

    def _warn(self, index: OpenIndex, what: str) -> None:
        if self._warned != index.version:  # Once for each state.
            self._warned = index.version
            line = f"the collection {self.collection(index)} {what}; {self._how(index)}"
            print(line, file=sys.stderr)

    def _how(self, index: OpenIndex) -> str:
        command = f"python -m drl_jax.search export --index={index.directory} --url={self._url}"
        return f"make or update it with: {command}"

    def _slots(self, index: OpenIndex, points: Iterable[Any]) -> np.ndarray:
        """The slots of points, int64 [N]; -1 for those that a state lacks."""
        known, slots = self._known(index)
        ids = np.array([point.id for point in points], np.uint64)
        rows = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        return np.where(known[rows] == ids, slots[rows], -1)

    def _read_known(self, index: OpenIndex) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the points that a state has, ascending, and their slots."""
        keys = [(one.segment, one.prefix) for one in index.segments]
        self._ids = {k: self._ids[k] if k in self._ids else _point_ids(*k) for k in keys}
        slots = np.flatnonzero(index.valid)
        ids = np.concatenate(list(self._ids.values()))[slots]
        order = np.argsort(ids)
        return ids[order], slots[order]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from qdrant_client.http.exceptions import ApiException

        try:
            yield
        except (ApiException, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"Qdrant at {self._url}: {one_line(error)}") from error


def _point_ids(segment: Segment, prefix: str) -> np.ndarray:
    """The ids of the points of all windows of a segment, uint64."""
    ids, table = [], segment.table.select(["path", "sha256", "windows"]).to_pydict()
    for path, digest, count in zip(*table.values(), strict=True):
        for number in range(count):
            text = f"{prefix}{path}\0{digest}\0{number}"
            ids.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]))
    return np.array(ids, np.uint64)
