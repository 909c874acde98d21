"""An open index that answers: sentences and videos as queries, hits with their reasons."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from drl_jax import pretrained as models
from drl_jax.models.interaction import Features
from drl_jax.pretrained import SearchModel
from drl_jax.search.engine import Gallery, Ranking, SearchEngine, restored, video_as_query
from drl_jax.search.explain import Explanation, explain
from drl_jax.search.store import IndexedVideo, SearchIndexError, Store, database_version


@dataclasses.dataclass(frozen=True)
class Hit:
    """A video that a query found.

    Attributes:
      rank: from 1.
      score: similarity, as evaluation computes it.
      path: of the file.
      video: what the index knows of it.
      explanation: None where the query is a video.
    """

    rank: int
    score: float
    path: Path
    video: IndexedVideo
    explanation: Explanation | None

    def to_json(self) -> dict[str, Any]:
        """The hit as `--json` prints it; times in seconds."""
        found: dict[str, Any] = {
            "rank": self.rank,
            "score": round(self.score, 6),
            "path": str(self.path),
        }
        if self.explanation is not None:
            found["moment"] = round(self.explanation.moment, 3)
            found["words"] = [
                {
                    "word": word,
                    "time": round(time, 3),
                    "similarity": round(similarity, 4),
                    "weight": round(weight, 4),
                }
                for word, time, similarity, weight in self.explanation.matches()
            ]
        return found


class Searcher(Protocol):
    """What answers sentences: a session, or an engine before it."""

    @property
    def videos(self) -> Sequence[IndexedVideo]:
        """Those that can be found."""

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """The best videos for each sentence."""


class SearchSession:
    """An index and its model, ready for queries."""

    def __init__(self, directory: Path, model: SearchModel | None = None):
        """Opens an index.

        Args:
          directory: of the index.
          model: the one it was made with; None: it is loaded from where the index says it is.

        Raises:
          UserError: no index, nothing in it to search, or not its model.
        """
        self.directory = directory
        self._version = database_version(directory)
        with Store(directory) as store:
            if not store.header:
                raise SearchIndexError(
                    f"the index {directory} is empty: its making was interrupted at once"
                )
            self.header = store.header
            known = store.videos()
            arrays = store.arrays()
        self.videos = [video for video in known if not video.error]
        if not self.videos:
            raise SearchIndexError(
                f"the index {directory} has no video that can be searched ({len(known)} cannot)"
            )
        self.folder = Path(self.header["videos"])
        self.model = models.from_source(self.header["source"]) if model is None else model
        if self.model.fingerprint != self.header["fingerprint"]:
            raise SearchIndexError(
                f"the index {directory} was made with another model than"
                f" {' '.join(self.model.source.values())}; make a new one, or name its own model"
            )
        self._arrays = arrays
        self._video_of = {video.slot: video for video in self.videos}
        self._video_at = {video.path: video for video in self.videos}
        self.gallery = Gallery(arrays, list(self._video_of), self.model.layout)
        self._engine = SearchEngine(self.model.config.model, self.model.params)

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """The best videos for each sentence.

        Raises:
          UserError: a sentence is blank.
        """
        text = self.model.embed_sentences(sentences)
        return self._explained(sentences, text, self.rank(text, top))

    def search_among(
        self, sentence: str, text: Features, videos: Sequence[IndexedVideo], top: int
    ) -> list[Hit]:
        """The best of some videos of the index for a sentence, compared as `search` does.

        Args:
          sentence: the query.
          text: its arrays, of `SearchModel.embed_sentences`.
          videos: candidates that another engine found, without repetition.
          top: how many.
        """
        return self._explained([sentence], text, self.rank(text, top, videos))[0]

    def rank(
        self, text: Features, top: int, videos: Sequence[IndexedVideo] | None = None
    ) -> Ranking:
        """The best videos for embedded sentences, of all or of those given."""
        if videos is None:
            return self._engine.search(text, self.gallery, top)
        slots = np.array([video.slot for video in videos])
        found = self._engine.search(text, self.gallery.only(slots), top)
        return Ranking(found.scores, slots[found.slots])

    def search_by_video(self, path: Path, top: int) -> list[Hit]:
        """The videos that are most like a file, itself included if it is indexed.

        Raises:
          UserError: the file cannot be read.
        """
        query = video_as_query(self.model.embed_file(path).features)
        ranking = self._engine.search(query, self.gallery, top)
        return [
            self._hit(rank, score, slot, None)
            for rank, (score, slot) in enumerate(
                zip(ranking.scores[0], ranking.slots[0], strict=True), start=1
            )
        ]

    def rank_sentences(self, path: Path, sentences: Sequence[str]) -> list[tuple[float, str]]:
        """Sentences with their similarity to a video file, the best first.

        Raises:
          UserError: the file cannot be read, or a sentence is blank.
        """
        model = self.model
        text, video = model.embed_sentences(sentences), model.embed_file(path).features
        scores = model.embedder.similarity(model.params, text, video)[:, 0]
        order = np.argsort(-scores, kind="stable")
        return [(float(scores[row]), sentences[row]) for row in order]

    def stored(self, videos: Sequence[IndexedVideo]) -> Features:
        """The arrays of indexed videos, features float32, a row a video."""
        slots = [video.slot for video in videos]
        rows = {name: np.asarray(array[slots]) for name, array in self._arrays.items()}
        return {name: np.asarray(array) for name, array in jax.device_get(restored(rows)).items()}

    def is_current(self) -> bool:
        """Whether the index is as it was when the session was opened."""
        return self._version == database_version(self.directory)

    def is_unchanged(self, video: IndexedVideo) -> bool:
        """Whether a video's file is the one that was indexed, by its size and time of change."""
        try:
            status = (self.folder / video.path).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (video.size, video.mtime_ns)

    def video_at(self, path: str) -> IndexedVideo | None:
        """The video with exactly this path below the folder, if it can be searched."""
        return self._video_at.get(path)

    def thumbnails(self, video: IndexedVideo) -> bytes:
        """A JPEG file with the frames of an indexed video side by side."""
        with Store(self.directory) as store:
            return store.thumbnails(video.path)

    def _explained(
        self, sentences: Sequence[str], text: Features, ranking: Ranking
    ) -> list[list[Hit]]:
        return [
            [
                self._hit(rank, score, slot, ({name: a[query] for name, a in text.items()}, tokens))
                for rank, (score, slot) in enumerate(
                    zip(ranking.scores[query], ranking.slots[query], strict=True), start=1
                )
            ]
            for query, tokens in enumerate(self.model.tokens(sentences))
        ]

    def _hit(
        self, rank: int, score: float, slot: int, query: tuple[Features, list[str]] | None
    ) -> Hit:
        video = self._video_of[int(slot)]
        explanation = None
        if query is not None:
            text, tokens = query
            stored = {name: array[0] for name, array in self.stored([video]).items()}
            explanation = explain(text, stored, tokens, video.times)
        return Hit(rank, float(score), self.folder / video.path, video, explanation)
