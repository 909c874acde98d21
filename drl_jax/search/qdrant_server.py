"""A collection of a Qdrant server or cluster."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException
from tqdm import tqdm

from drl_jax.runtime.errors import UserError
from drl_jax.search.candidate_engine import BREADTH, GRAPH_CANDIDATES, GRAPH_LINKS, Point

# Ids that are read at a time; ids that are deleted at a time.
_READ, _DELETED = 10_000, 1000
# Seconds between two questions whether the graph is built.
_POLL = 1.0


class ServerCollection:
    """See `CandidateEngine`."""

    def __init__(self, url: str, name: str, client: QdrantClient | None = None):
        """Connects.

        Args:
          url: of the server; its API key is in QDRANT_API_KEY.
          name: of the collection.
          client: a connection; None: to the URL.
        """
        self.where, self._name = url, name
        with self._errors():
            self._client = client or QdrantClient(
                url=url,
                api_key=os.environ.get("QDRANT_API_KEY") or None,
                timeout=60,
                check_compatibility=False,
            )

    def exists(self) -> bool:
        with self._errors():
            return self._client.collection_exists(self._name)

    def count(self) -> int:
        with self._errors():
            return self._client.count(self._name).count

    def query(self, vector: np.ndarray, count: int) -> list[dict[str, Any]]:
        params = models.SearchParams(
            hnsw_ef=BREADTH * count,
            # Candidates are compared exactly anyway.
            quantization=models.QuantizationSearchParams(rescore=False),
        )
        with self._errors():
            found = self._client.query_points(
                self._name,
                query=vector.tolist(),
                limit=count,
                with_payload=True,
                search_params=params,
            )
        return [point.payload for point in found.points]

    @contextlib.contextmanager
    def update(self, width: int) -> Iterator["ServerCollection"]:
        if not self.exists():
            self._create(width)
        yield self
        self._wait_for_graph()

    def _create(self, width: int) -> None:
        with self._errors():
            self._client.create_collection(
                self._name,
                vectors_config=models.VectorParams(
                    size=width,
                    distance=models.Distance.DOT,
                    datatype=models.Datatype.FLOAT16,
                    on_disk=True,
                ),
                # As in this process; see `qdrant_edge`.
                quantization_config=models.ScalarQuantization(
                    scalar=models.ScalarQuantizationConfig(
                        type=models.ScalarType.INT8, quantile=1.0, always_ram=True
                    )
                ),
                hnsw_config=models.HnswConfigDiff(m=GRAPH_LINKS, ef_construct=GRAPH_CANDIDATES),
            )

    def ids(self) -> set[str]:
        found, offset = set(), None
        while True:
            with self._errors():
                points, offset = self._client.scroll(
                    self._name, limit=_READ, offset=offset, with_payload=False
                )
            found.update(str(point.id) for point in points)
            if offset is None:
                return found

    def delete(self, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), _DELETED):
            with self._errors():
                self._client.delete(self._name, list(ids[start : start + _DELETED]))

    def upsert(self, points: Iterable[Point]) -> None:
        sent = [
            models.PointStruct(id=point.id, vector=point.vector.tolist(), payload=point.payload)
            for point in points
        ]
        with self._errors():
            self._client.upsert(self._name, sent, wait=True)

    def _wait_for_graph(self) -> None:
        """Waits until the server has built the graph, and shows the time it takes."""
        with tqdm(
            desc="building the graph", bar_format="{desc}: {elapsed}", mininterval=1
        ) as progress:
            while True:
                with self._errors():
                    status = self._client.get_collection(self._name).status
                if status in (models.CollectionStatus.GREEN, models.CollectionStatus.RED):
                    return
                time.sleep(_POLL)
                progress.update()

    def close(self) -> None:
        self._client.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Reports errors of the client in one line."""
        try:
            yield
        except (
            ApiException,
            ResponseHandlingException,
            OSError,
            RuntimeError,
            ValueError,
        ) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"Qdrant at {self.where}: {reason}") from error
