"""What an engine of candidates provides: a collection of points that it ranks by dot product.

Qdrant in this process (`qdrant_edge`) and a Qdrant server (`qdrant_server`) store the same points.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

# Links of a node of the graph, and candidates for them: Qdrant's defaults.
GRAPH_LINKS, GRAPH_CANDIDATES = 16, 100
# Points that a search of the graph keeps, for each candidate that it is asked for. Sentences lie
# apart from the videos that the graph links: in a million, 500 candidates have 97 % of the exact
# best ten with 10, and 99 % with 40, in 14 and 30 ms.
BREADTH = 40


class Point(NamedTuple):
    """A window of a video.

    Attributes:
      id: a UUID.
      vector: float32 [D].
      payload: `path` of the video, `sha256` of its file, `window`: its number in the video.
    """

    id: str
    vector: np.ndarray
    payload: dict[str, Any]


class CollectionUpdate(Protocol):
    """Changes of a collection."""

    def ids(self) -> set[str]:
        """Ids of the points, with those that an interrupted update sent."""

    def delete(self, ids: Sequence[str]) -> None:
        """Removes points."""

    def upsert(self, points: Iterable[Point]) -> None:
        """Adds points."""


class CandidateEngine(Protocol):
    """A collection. All methods raise UserError if the engine fails.

    Attributes:
      where: directory or URL, for messages.
    """

    where: str

    def exists(self) -> bool:
        """Whether the collection was made."""

    def count(self) -> int:
        """Number of points."""

    def query(self, vector: np.ndarray, count: int) -> list[dict[str, Any]]:
        """Payloads of the points with the largest dot products, approximately, the best first.

        Args:
          vector: float32 [D].
          count: number of points.
        """

    def update(self, width: int) -> AbstractContextManager[CollectionUpdate]:
        """Changes the collection, which is made if it does not exist.

        At the end of the block its graph is built. What an interrupted block has sent is kept.

        Args:
          width: D, channels of the vectors.
        """

    def close(self) -> None:
        """Releases the engine."""
