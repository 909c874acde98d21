"""An open index that answers: sentences and videos as queries, hits with their reasons."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from drl_jax.embedding import Features
from drl_jax.errors import UserError
from drl_jax.search import model as models
from drl_jax.search.engine import Gallery, SearchEngine, restored, video_as_query
from drl_jax.search.explain import Explanation, explain
from drl_jax.search.model import SearchModel
from drl_jax.search.store import IndexedVideo, SearchIndexError, Store
from drl_jax.tokenizer import token_strings, tokenize
from drl_jax.video import VideoError, read_timed_frames


@dataclasses.dataclass(frozen=True)
class Hit:
    """A video that a query found.

    Attributes:
      rank: from 1.
      score: similarity, as evaluation computes it.
      path: of the file.
      explanation: None where the query is a video.
    """

    rank: int
    score: float
    path: Path
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
        slots = np.array([video.slot for video in self.videos])
        self._row_of = {slot: row for row, slot in enumerate(slots)}
        self.gallery = Gallery(arrays, slots, self.model.layout)
        self._engine = SearchEngine(self.model, self.gallery)

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """The best videos for each sentence.

        Raises:
          UserError: a sentence is blank.
        """
        text = self.embed(sentences)
        ranking = self._engine.search(text, top)
        text_ids, _ = tokenize(list(sentences), self.model.config.data.max_words)
        return [
            [
                self._hit(
                    rank,
                    ranking.scores[query, rank],
                    self._video(ranking.rows[query, rank]),
                    {name: array[query] for name, array in text.items()},
                    token_strings(text_ids[query]),
                )
                for rank in range(ranking.scores.shape[1])
            ]
            for query in range(len(sentences))
        ]

    def search_by_video(self, path: Path, top: int) -> list[Hit]:
        """The videos that are most like a file, itself included if it is indexed.

        Raises:
          UserError: the file cannot be read.
        """
        ranking = self._engine.search(video_as_query(self.embed_video(path)), top)
        return [
            Hit(rank + 1, float(score), self.folder / self._video(row).path, None)
            for rank, (score, row) in enumerate(
                zip(ranking.scores[0], ranking.rows[0], strict=True)
            )
        ]

    def rank_sentences(self, path: Path, sentences: Sequence[str]) -> list[tuple[float, str]]:
        """Sentences with their similarity to a video file, the best first.

        Raises:
          UserError: the file cannot be read, or a sentence is blank.
        """
        text, video = self.embed(sentences), self.embed_video(path)
        scores = self.model.embedder.similarity(self.model.params, text, video)[:, 0]
        order = np.argsort(-scores, kind="stable")
        return [(float(scores[row]), sentences[row]) for row in order]

    def embed(self, sentences: Sequence[str]) -> Features:
        """The arrays of sentences.

        Raises:
          UserError: one is blank.
        """
        if not sentences or not all(sentence.strip() for sentence in sentences):
            raise UserError("a query is blank; write a sentence")
        return self.model.embedder.captions(self.model.params, list(sentences))

    def embed_video(self, path: Path) -> Features:
        """The arrays of one file, decoded now.

        Raises:
          UserError: it cannot be read.
        """
        config = self.model.config
        try:
            frames, _ = read_timed_frames(
                path, config.data.max_frames, config.model.clip.image_resolution
            )
        except VideoError as error:
            raise UserError(f"{path} {error}") from error
        return self.model.embedder.videos(self.model.params, lambda rows: [frames] * len(rows), 1)

    def stored(self, video: IndexedVideo) -> Features:
        """The arrays of an indexed video, float32."""
        rows = {name: np.asarray(array[video.slot]) for name, array in self._arrays.items()}
        return {name: np.asarray(array) for name, array in jax.device_get(restored(rows)).items()}

    def _video(self, slot: int) -> IndexedVideo:
        return self.videos[self._row_of[int(slot)]]

    def _hit(
        self, rank: int, score: float, video: IndexedVideo, text: Features, tokens: list[str]
    ) -> Hit:
        explanation = explain(text, self.stored(video), tokens, video.times)
        return Hit(rank + 1, float(score), self.folder / video.path, explanation)
