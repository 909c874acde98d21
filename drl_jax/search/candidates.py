"""Search with candidates of an engine, for galleries that take too long to compare as a whole.

The engine ranks one vector of each window by its dot product with one of the sentence
(`Interaction.HAS_VECTORS`); the candidates are then compared exactly here.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from drl_jax.models.interactions import Features
from drl_jax.runtime.errors import UserError
from drl_jax.search import CANDIDATES
from drl_jax.search.candidate_engine import CandidateEngine, Point
from drl_jax.search.hits import Hit
from drl_jax.search.query import encode_sentences
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.session import SearchSession
from drl_jax.search.snapshot import IndexSnapshot

# Windows of a request, and videos that are read at a time.
_BATCH = 512
# The id of a point is derived from this, the path and the hash of its video, and its window.
_NAMESPACE = uuid.UUID("6d1f0a64-5f0e-4c4e-9b56-4f3a3c6cf1d8")
# What earlier versions wrote beside the collections.
_EARLIER = ("collection", "meta.json", ".lock")


@dataclasses.dataclass
class ExportReport:
    """Result of an export: windows sent, deleted (a changed one is both), and up to date."""

    collection: str
    sent: int = 0
    deleted: int = 0
    unchanged: int = 0


class CandidateSearch:
    """Answers sentences like `SearchSession.search`, from candidates of an engine.

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
        candidates: int = CANDIDATES,
    ):
        """Connects to a server, or opens the collection in the directory `qdrant` of the index.

        Args:
          session: the index.
          url: of a Qdrant server, with its API key in QDRANT_API_KEY; empty: in this process.
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
        self.collection = collection or _collection_name(session)
        self._directory = session.directory / "qdrant"
        self._engine = self._open(url)

    def _open(self, url: str) -> CandidateEngine:
        try:
            if url:
                from drl_jax.search.qdrant_server import ServerCollection

                return ServerCollection(url, self.collection)
            from drl_jax.search.qdrant_edge import EdgeCollection

            if Path(self.collection).name != self.collection:
                raise UserError(f"--collection={self.collection} is not a name of a directory")
            return EdgeCollection(self._directory / self.collection)
        except ImportError as error:
            raise UserError("Qdrant is not installed: pip install 'drl_jax[qdrant]'") from error

    @property
    def videos(self) -> Sequence[IndexedVideo]:
        """The videos that can be found."""
        return self.session.videos

    def close(self) -> None:
        """Releases the engine."""
        self._engine.close()

    # ------------------------------------------------------------------ export

    def export(self) -> ExportReport:
        """Updates the collection to the index; sends only new and changed windows.

        Raises:
          UserError: the engine fails, or another process updates the collection.
        """
        index, report = self.session.snapshot(), ExportReport(self.collection)
        for name in _EARLIER:
            with contextlib.suppress(OSError):
                (self._directory / name).unlink()
            shutil.rmtree(self._directory / name, ignore_errors=True)
        windows = index.videos.windows
        with self._engine.update(self._width(index)) as update:
            outdated = update.ids()
            with tqdm(total=windows, desc="exporting", unit="window") as progress:
                for batch in _batches(_new_windows(index, outdated, progress)):
                    update.upsert(self._points_of(index, batch))
                    report.sent += len(batch)
            if outdated:
                update.delete(sorted(outdated))
        report.deleted, report.unchanged = len(outdated), windows - report.sent
        return report

    def _width(self, index: IndexSnapshot) -> int:
        is_corrected = self.session.correction is not None
        return index.model.config.model.backbone.embed_dim + is_corrected

    def _points_of(
        self, index: IndexSnapshot, windows: Sequence[tuple[IndexedVideo, int]]
    ) -> list[Point]:
        vectors = index.model.interaction.video_vectors(index.stored_windows(windows))
        if self.session.correction is not None:
            # One more channel, which the 1 of a query reads.
            vectors = np.column_stack([vectors, -index.biases_of_windows(windows)])
        return [
            Point(
                _point_id(video, window),
                vector,
                {"path": video.path, "sha256": video.sha256, "window": window},
            )
            for (video, window), vector in zip(
                windows, vectors.astype(np.float32, copy=False), strict=True
            )
        ]

    # ------------------------------------------------------------------ search

    def check(self) -> None:
        """Warns on stderr if the collection does not have as many windows as the index.

        Raises:
          UserError: there is no such collection.
        """
        export = f"python -m drl_jax.search export --index={self.session.directory}"
        if not self._engine.exists():
            raise UserError(
                f"there is no collection {self.collection} at {self._engine.where}; make it with:"
                f" {export}"
            )
        count, windows = self._engine.count(), self.session.snapshot().videos.windows
        if count != windows:
            print(
                f"the collection {self.collection} has {count} windows and the index"
                f" {windows}; update it with: {export}",
                file=sys.stderr,
            )

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """Finds the best of the candidates for each sentence, with exact scores.

        Raises:
          UserError: a sentence is blank, or the engine fails.
        """
        index, found = self.session.snapshot(), []
        for query in encode_sentences(index.model, sentences):
            found.append(index.hits(query, self.best_videos(index, query.parts, top)))
        return found

    def best_videos(self, index: IndexSnapshot, text: Features, top: int) -> list[IndexedVideo]:
        """The best videos for an encoded sentence, [1, ...] each, of the candidates.

        Raises:
          UserError: the engine fails, or has no video of the index.
        """
        slots = self.candidates(index, text, max(self._candidates, top))
        return index.best_among(text, slots, top)

    def candidates(self, index: IndexSnapshot, text: Features, count: int) -> np.ndarray:
        """Asks the engine for windows; leaves out those that the index no longer has.

        Args:
          index: state of the index.
          text: arrays of one query, [1, ...] each.
          count: number of windows.

        Returns:
          int64 [N], their slots, the best first; N is at most `count`.

        Raises:
          UserError: the engine fails, or has no video of the index.
        """
        vector = index.model.interaction.query_vectors(text)[0]
        if self.session.correction is not None:
            vector = np.append(vector, np.float32(1))
        found = self._engine.query(vector, count)
        slots = index.videos.slots_of_windows(
            [(window["path"], window["sha256"], window["window"]) for window in found]
        )
        if not len(slots):
            raise UserError(
                f"no candidate of {self.collection} is in the index; update it with: python -m"
                f" drl_jax.search export --index={index.directory}"
            )
        return slots


def _collection_name(session: SearchSession) -> str:
    header = session.snapshot().header
    # An index that was upgraded from format 2 keeps its collection.
    fingerprint = header.get("format_2_fingerprint") or header["fingerprint"]
    # Collections of version 0.2 have several vectors in a point.
    key = f"{fingerprint} {header['videos']} one vector"
    if session.correction is not None:
        key += f" {session.correction} {header['hubness']['sha256']}"
    return f"drl_jax_{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _new_windows(
    index: IndexSnapshot, stored: set[str], progress: tqdm
) -> Iterator[tuple[IndexedVideo, int]]:
    """Yields the windows that are not stored, and removes those that are from the set."""
    for videos in index.videos.chunks(_BATCH):
        for video in videos:
            for window in range(len(video.windows)):
                point = _point_id(video, window)
                if point in stored:
                    stored.remove(point)
                else:
                    yield video, window
            progress.update(len(video.windows))


def _batches(windows: Iterator[tuple[IndexedVideo, int]]) -> Iterator[list]:
    while batch := list(itertools.islice(windows, _BATCH)):
        yield batch


def _point_id(video: IndexedVideo, window: int) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{video.path}\0{video.sha256}\0{window}"))
