"""Search with candidates from Qdrant, for galleries that do not fit on one machine.

Interactions with vectors (`Interaction.HAS_VECTORS`) are searched by MaxSim in a collection with
several vectors per point; the candidates are then compared exactly here. Qdrant's embedded mode (a
directory) and a cluster take the same calls.
"""

import contextlib
import dataclasses
import hashlib
import os
import sys
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException
from tqdm import tqdm

from drl_jax.models.interactions import Features
from drl_jax.runtime.errors import UserError
from drl_jax.search.hits import Hit
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.session import SearchSession
from drl_jax.search.snapshot import IndexSnapshot

# Videos per request.
_BATCH = 64
# The id of a point is derived from this and the path of its video.
_NAMESPACE = uuid.UUID("6d1f0a64-5f0e-4c4e-9b56-4f3a3c6cf1d8")


@dataclasses.dataclass
class ExportReport:
    """Result of an export: windows sent, points deleted, windows that were up to date."""

    collection: str
    sent: int = 0
    deleted: int = 0
    unchanged: int = 0


class QdrantSearch:
    """Answers sentences like `SearchSession.search`, from candidates of Qdrant.

    Attributes:
      session: the index.
      collection: name of the collection.
    """

    def __init__(
        self,
        session: SearchSession,
        *,
        url: str = "",
        collection: str = "",
        candidates: int = 100,
    ):
        """Connects; the embedded engine's files are in the directory `qdrant` of the index.

        Args:
          session: the index.
          url: of a cluster, with its API key in QDRANT_API_KEY; empty: embedded.
          collection: name of the collection; empty: derived from the index's model and folder.
          candidates: number of candidates per query.

        Raises:
          UserError: no connection, or the model's interaction has no vectors.
        """
        model = session.model
        if not model.interaction.HAS_VECTORS:
            raise UserError(
                f"the interaction {model.config.model.interaction} has no vectors that an engine"
                " can search; search without --engine"
            )
        self.session, self._candidates = session, candidates
        header = session.snapshot().header
        # An index that was upgraded from format 2 keeps its collection.
        fingerprint = header.get("format_2_fingerprint") or header["fingerprint"]
        key = f"{fingerprint} {header['videos']}"
        if session.correction is not None:
            key += f" {session.correction} {header['hubness']['sha256']}"
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        self.collection = collection or f"drl_jax_{name}"
        self._where = url or str(session.directory / "qdrant")
        with self._errors():
            if url:
                api_key = os.environ.get("QDRANT_API_KEY") or None
                self._client = QdrantClient(
                    url=url, api_key=api_key, timeout=60, check_compatibility=False
                )
            else:
                self._client = QdrantClient(path=self._where)

    @property
    def videos(self) -> Sequence[IndexedVideo]:
        """The videos that can be found."""
        return self.session.videos

    def close(self) -> None:
        """Closes the connection, and releases the embedded engine's lock."""
        self._client.close()

    # ------------------------------------------------------------------ export

    def export(self) -> ExportReport:
        """Updates the collection to the index; sends only new and changed videos.

        Raises:
          UserError: the engine fails.
        """
        index, report = self.session.snapshot(), ExportReport(self.collection)
        with self._errors():
            if not self._client.collection_exists(self.collection):
                self._client.create_collection(
                    self.collection,
                    vectors_config=models.VectorParams(
                        size=index.model.config.model.backbone.embed_dim
                        + (self.session.correction is not None),
                        distance=models.Distance.DOT,
                        multivector_config=models.MultiVectorConfig(
                            comparator=models.MultiVectorComparator.MAX_SIM
                        ),
                    ),
                )
            stored = dict(self._points())
            wanted = {
                _point_id(video, window): (video, window)
                for video in index.videos
                for window in range(len(video.windows))
            }
            outdated = sorted(stored.keys() - wanted.keys())
            for start in range(0, len(outdated), 1000):
                self._client.delete(self.collection, outdated[start : start + 1000])
            pending = [w for point, w in wanted.items() if stored.get(point) != w[0].sha256]
            report.deleted, report.unchanged = len(outdated), len(wanted) - len(pending)
            with tqdm(total=len(pending), desc="exporting", unit="window") as progress:
                for start in range(0, len(pending), _BATCH):
                    batch = pending[start : start + _BATCH]
                    self._client.upsert(self.collection, self._points_of(index, batch), wait=True)
                    progress.update(len(batch))
            report.sent = len(pending)
        return report

    def _points(self) -> Iterator[tuple[str, str]]:
        """Yields the id of each point, and the SHA-256 of the file it was made from."""
        offset = None
        while True:
            points, offset = self._client.scroll(
                self.collection, limit=1000, offset=offset, with_payload=["sha256"]
            )
            yield from ((str(point.id), point.payload["sha256"]) for point in points)
            if offset is None:
                return

    def _points_of(
        self, index: IndexSnapshot, windows: Sequence[tuple[IndexedVideo, int]]
    ) -> list[models.PointStruct]:
        stored, interaction = index.stored_windows(windows), index.model.interaction
        biases = None
        if self.session.correction is not None:
            biases = index.biases_of_windows(windows)
        points = []
        for row, (video, window) in enumerate(windows):
            arrays = {name: array[row] for name, array in stored.items()}
            vectors = interaction.video_vectors(arrays)
            if biases is not None:
                vectors = np.pad(vectors, ((0, 0), (0, 1)), constant_values=-biases[row])
            payload = {"path": video.path, "sha256": video.sha256, "window": window}
            points.append(
                models.PointStruct(
                    id=_point_id(video, window), vector=vectors.tolist(), payload=payload
                )
            )
        return points

    # ------------------------------------------------------------------ search

    def check(self) -> None:
        """Warns on stderr if the collection does not have as many videos as the index.

        Raises:
          UserError: there is no such collection.
        """
        with self._errors():
            if not self._client.collection_exists(self.collection):
                raise UserError(
                    f"{self._where} has no collection {self.collection}; make it with: python -m"
                    f" drl_jax.search export --index={self.session.directory}"
                )
            count = self._client.count(self.collection).count
        windows = self.session.snapshot().videos.windows
        if count != windows:
            print(
                f"the collection {self.collection} has {count} windows and the index"
                f" {windows}; update it with: python -m drl_jax.search export"
                f" --index={self.session.directory}",
                file=sys.stderr,
            )

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """Finds the best of the candidates for each sentence, with exact scores.

        Raises:
          UserError: a sentence is blank, or the engine fails.
        """
        index = self.session.snapshot()
        text = index.model.encode_text(sentences)
        found = []
        for row, sentence in enumerate(sentences):
            one = {name: array[row : row + 1] for name, array in text.items()}
            videos = self.candidates(index, one, max(self._candidates, top))
            found.append(index.search_among(sentence, one, videos, top))
        return found

    def candidates(self, index: IndexSnapshot, text: Features, count: int) -> list[IndexedVideo]:
        """Asks the engine for candidates: the videos of its best windows, each once.

        Leaves out those that the index no longer has.

        Args:
          index: state of the index.
          text: arrays of one query, [1, ...] each.
          count: number of windows.

        Raises:
          UserError: the engine fails, or has no video of the index.
        """
        query = {name: array[0] for name, array in text.items()}
        vectors = index.model.interaction.query_vectors(query)
        if self.session.correction is not None:
            vectors = _with_bias_token(vectors)
        with self._errors():
            points = self._client.query_points(
                self.collection, query=vectors.tolist(), limit=count, with_payload=True
            ).points
        videos = {}
        for point in points:
            video = index.video_at(point.payload["path"])
            if video is not None and video.sha256 == point.payload["sha256"]:
                videos[video.path] = video
        if not videos:
            raise UserError(
                f"no candidate of {self.collection} is in the index; update it with: python -m"
                f" drl_jax.search export --index={index.directory}"
            )
        return list(videos.values())

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
            raise UserError(f"Qdrant at {self._where}: {reason}") from error


def _point_id(video: IndexedVideo, window: int) -> str:
    # Collections of version 0.2 have one point a video, which is its first window.
    name = f"{video.path}\0{window}" if window else video.path
    return str(uuid.uuid5(_NAMESPACE, name))


def _with_bias_token(vectors: np.ndarray) -> np.ndarray:
    """Vectors of a query [n, D] -> [n + 1, D + 1]: one more, which finds the bias of a window.

    Vectors of windows have it, negative, as one more channel. The others are 0 there.
    """
    extended = np.pad(vectors, ((0, 1), (0, 1)))
    extended[-1, -1] = 1
    return extended
