"""Candidates from Qdrant, for galleries beyond one machine; they are compared exactly here.

The half of the token-wise interaction in which words look for frames,
sum_l w_l max_f <t_l, v_f>, is MaxSim over the vectors w_l t_l, which Qdrant searches in collections
with many vectors a point. Its embedded mode, in a directory, and a cluster take the same calls.
"""

import contextlib
import dataclasses
import hashlib
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException
from tqdm import tqdm

from drl_jax.models.interaction import Features
from drl_jax.runtime.errors import UserError
from drl_jax.search.session import Hit, SearchSession
from drl_jax.search.store import IndexedVideo

# Videos of a request.
_BATCH = 64
# Names of points: a video's path in this namespace.
_NAMESPACE = uuid.UUID("6d1f0a64-5f0e-4c4e-9b56-4f3a3c6cf1d8")


@dataclasses.dataclass
class ExportReport:
    """What an export did: videos sent, points deleted, videos that were there already."""

    collection: str
    sent: int = 0
    deleted: int = 0
    unchanged: int = 0


@dataclasses.dataclass(frozen=True)
class Recall:
    """How much of the exact answer some number of candidates holds.

    Attributes:
      candidates: asked for a query.
      recall: of the exact best `top`, the share that is among the best of the candidates, 0 to 1.
      engine_seconds: median time of a query in the engine.
      rerank_seconds: of the exact comparison with the candidates.
      exact_seconds: of the exact comparison with all videos.
    """

    candidates: int
    recall: float
    engine_seconds: float
    rerank_seconds: float
    exact_seconds: float


class QdrantSearch:
    """Answers sentences as `SearchSession.search`, from candidates of an engine."""

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
          url: of a cluster, which may ask for the key in QDRANT_API_KEY; empty: embedded.
          collection: its name; empty: one that belongs to the index's model and folder.
          candidates: asked of the engine for a query.

        Raises:
          UserError: no connection, or the interaction has no vectors to search by.
        """
        interaction = session.model.config.model.interaction
        if interaction == "xti":
            raise UserError(
                "xti compares a sentence and a video in a transformer, and has no vectors for an"
                " engine; search without --engine"
            )
        self._session, self._candidates = session, candidates
        key = f"{session.header['fingerprint']} {session.header['videos']}"
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
        return self._session.videos

    def close(self) -> None:
        """Ends the connection; the embedded engine lets others in."""
        self._client.close()

    # ------------------------------------------------------------------ export

    def export(self) -> ExportReport:
        """Brings the collection up to date with the index; what is there already is not sent.

        Raises:
          UserError: the engine fails.
        """
        session, report = self._session, ExportReport(self.collection)
        with self._errors():
            if not self._client.collection_exists(self.collection):
                self._client.create_collection(
                    self.collection,
                    vectors_config=models.VectorParams(
                        size=session.model.config.model.clip.embed_dim,
                        distance=models.Distance.DOT,
                        multivector_config=models.MultiVectorConfig(
                            comparator=models.MultiVectorComparator.MAX_SIM
                        ),
                    ),
                )
            there = dict(self._points())
            wanted = {_point(video): video for video in session.videos}
            gone = sorted(there.keys() - wanted.keys())
            for start in range(0, len(gone), 1000):
                self._client.delete(self.collection, gone[start : start + 1000])
            due = [video for point, video in wanted.items() if there.get(point) != video.sha256]
            report.deleted, report.unchanged = len(gone), len(session.videos) - len(due)
            with tqdm(total=len(due), desc="exporting", unit="video") as progress:
                for start in range(0, len(due), _BATCH):
                    batch = due[start : start + _BATCH]
                    self._client.upsert(self.collection, _structs(session, batch), wait=True)
                    progress.update(len(batch))
            report.sent = len(due)
        return report

    def _points(self) -> Iterator[tuple[str, str]]:
        """Names of the points that are there, with the content that they were made of."""
        offset = None
        while True:
            points, offset = self._client.scroll(
                self.collection, limit=1000, offset=offset, with_payload=["sha256"]
            )
            yield from ((str(point.id), point.payload["sha256"]) for point in points)
            if offset is None:
                return

    # ------------------------------------------------------------------ search

    def check(self) -> None:
        """Says on stderr if the collection is not up to date.

        Raises:
          UserError: there is no such collection.
        """
        with self._errors():
            if not self._client.collection_exists(self.collection):
                raise UserError(
                    f"{self._where} has no collection {self.collection}; make it with: python -m"
                    f" drl_jax.search export --index={self._session.directory}"
                )
            count = self._client.count(self.collection).count
        if count != len(self.videos):
            print(
                f"the collection {self.collection} has {count} videos and the index"
                f" {len(self.videos)}; search export brings it up to date",
                file=sys.stderr,
            )

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """The best of the candidates for each sentence, with exact scores.

        Raises:
          UserError: a sentence is blank, or the engine fails.
        """
        text = self._session.model.embed_sentences(sentences)
        found = []
        for row, sentence in enumerate(sentences):
            one = {name: array[row : row + 1] for name, array in text.items()}
            videos = self.candidates(one, max(self._candidates, top))
            found.append(self._session.search_among(sentence, one, videos, top))
        return found

    def candidates(self, text: Features, count: int) -> list[IndexedVideo]:
        """What the engine finds for one query; videos that the index no longer has are left out.

        Args:
          text: the arrays of one query, [1, ...].
          count: how many to ask for.
        """
        with self._errors():
            points = self._client.query_points(
                self.collection, query=_query_vectors(text), limit=count, with_payload=True
            ).points
        videos = []
        for point in points:
            video = self._session.video_at(point.payload["path"])
            if video is not None and video.sha256 == point.payload["sha256"]:
                videos.append(video)
        if not videos:
            raise UserError(
                f"no candidate of {self.collection} is in the index as it is now; bring it up to"
                f" date with: python -m drl_jax.search export --index={self._session.directory}"
            )
        return videos

    def recall(self, sentences: Sequence[str], counts: Sequence[int], top: int) -> list[Recall]:
        """Compares search by candidates with exact search.

        Args:
          sentences: queries.
          counts: numbers of candidates to try.
          top: how many of the exact answer are looked for.
        """
        session = self._session
        text = session.model.embed_sentences(sentences)
        queries = [
            {name: array[row : row + 1] for name, array in text.items()}
            for row in range(len(sentences))
        ]
        session.rank(queries[0], top)  # compiled, and read from the disk
        exact, exact_seconds = [], []
        for query in tqdm(queries, "exact search", unit="query", leave=False):
            start = time.perf_counter()
            exact.append(set(session.rank(query, top).slots[0]))
            exact_seconds.append(time.perf_counter() - start)
        report = []
        for count in counts:
            session.rank(queries[0], top, self.candidates(queries[0], count))
            engine_seconds, rerank_seconds, found = [], [], 0
            for query, best in zip(
                tqdm(queries, f"{count} candidates", unit="query", leave=False), exact, strict=True
            ):
                start = time.perf_counter()
                videos = self.candidates(query, count)
                middle = time.perf_counter()
                slots = session.rank(query, top, videos).slots[0]
                rerank_seconds.append(time.perf_counter() - middle)
                engine_seconds.append(middle - start)
                found += len(best & set(slots))
            wanted = sum(map(len, exact))
            medians = map(np.median, (engine_seconds, rerank_seconds, exact_seconds))
            report.append(Recall(count, found / wanted, *map(float, medians)))
        return report

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What the client raises, as one line."""
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


def _point(video: IndexedVideo) -> str:
    return str(uuid.uuid5(_NAMESPACE, video.path))


def _structs(session: SearchSession, videos: Sequence[IndexedVideo]) -> list[models.PointStruct]:
    stored = session.stored(videos)
    return [
        models.PointStruct(
            id=_point(video),
            vector=_video_vectors({name: array[row] for name, array in stored.items()}),
            payload={"path": video.path, "sha256": video.sha256},
        )
        for row, video in enumerate(videos)
    ]


def _video_vectors(video: Features) -> list[list[float]]:
    if "video_feat" in video:
        return [video["video_feat"].tolist()]
    vectors = video["frame_feat"][video["frame_mask"]]
    if not video["frame_mask"].all():
        # A word that no frame is like finds the padding's similarity, 0 (`weighted_token_wise`).
        vectors = np.concatenate([vectors, np.zeros_like(vectors[:1])])
    return vectors.tolist()


def _query_vectors(text: Features) -> list[list[float]]:
    if "sentence_feat" in text:
        return text["sentence_feat"].tolist()
    mask = text["text_mask"][0]
    return (text["text_feat"][0] * text["text_weight"][0][:, None])[mask].tolist()
