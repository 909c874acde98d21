"""Searches an index: by sentences and by videos, with explained hits."""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from drl_jax.models.drl import Params, model_definition
from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel, load_source
from drl_jax.search.database import index_version
from drl_jax.search.engine import Gallery, Ranking, SearchEngine
from drl_jax.search.explain import Explanation, explain
from drl_jax.search.format_2 import made_with
from drl_jax.search.quantization import dequantize
from drl_jax.search.rows import IndexedVideo, SearchIndexError, check_features, damaged
from drl_jax.search.store import Store


@dataclasses.dataclass(frozen=True)
class Hit:
    """A video that a query found.

    Attributes:
      rank: from 1.
      score: similarity, as evaluation computes it.
      path: of the file.
      video: the file in the index.
      explanation: None if the query is a video.
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
    """Answers sentences: a session, or a candidate engine in front of it."""

    @property
    def videos(self) -> Sequence[IndexedVideo]:
        """The videos that can be found."""

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """The best videos for each sentence."""


class SearchSession:
    """An open index and its model.

    Every query is answered from the current state of the index, also while another process updates
    it. Safe to use from several threads.

    Attributes:
      directory: of the index.
      model: the model that the index was made with.
    """

    def __init__(self, directory: Path, model: RetrievalModel | None = None):
        """Opens an index.

        Args:
          directory: of the index.
          model: the model it was made with; None: loaded from where the index says it is.

        Raises:
          UserError: there is no index, no video to search, or the model is another one.
        """
        self.directory = directory
        if model is None:
            with Store(directory) as store:
                source = store.header["source"]
            model = load_source(source)
        self.model = model
        self._engine = SearchEngine(model.config.model, model.params)
        self._refreshing = threading.Lock()
        self._version: tuple[int, ...] | None = None
        self._snapshot = self.snapshot()

    @property
    def videos(self) -> Sequence[IndexedVideo]:
        """The videos that can be found."""
        return self.snapshot().videos

    def snapshot(self) -> "IndexSnapshot":
        """The current state of the index; opened again if the index has changed.

        Raises:
          UserError: see `__init__`.
        """
        with self._refreshing:
            version = index_version(self.directory)
            if not version or version != self._version:
                # The same database, with more transactions: most features are checked already.
                old = self._version
                updated = old and version and old[0] == version[0] and old[-1] < version[-1]
                previous = self._snapshot if updated else None
                self._snapshot = IndexSnapshot(self.directory, self.model, self._engine, previous)
                self._version = version
            return self._snapshot

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """See `IndexSnapshot.search`."""
        return self.snapshot().search(sentences, top)

    def search_by_video(self, path: Path, top: int) -> list[Hit]:
        """See `IndexSnapshot.search_by_video`."""
        return self.snapshot().search_by_video(path, top)

    def rank_sentences(self, path: Path, sentences: Sequence[str]) -> list[tuple[float, str]]:
        """Ranks sentences by their similarity to a video file.

        Returns:
          Pairs of similarity and sentence, the best first.

        Raises:
          UserError: the file cannot be read, or a sentence is blank.
        """
        model = self.model
        scores = model.similarity(model.encode_text(sentences), model.encode_video([path]))[:, 0]
        order = np.argsort(-scores, kind="stable")
        return [(float(scores[row]), sentences[row]) for row in order]


class IndexSnapshot:
    """One state of an index, ready for queries.

    Attributes:
      directory: of the index.
      header: what the index was made with.
      folder: folder of the videos.
      videos: the videos that can be found.
      model: the model of the index.
    """

    def __init__(
        self,
        directory: Path,
        model: RetrievalModel,
        engine: SearchEngine,
        previous: "IndexSnapshot | None" = None,
    ):
        """Reads the list of videos, maps the arrays, and checks them by their checksums.

        Args:
          directory: of the index.
          model: the model of the index.
          engine: compares texts and videos with that model.
          previous: an earlier state of the same index, whose features are not checked again.

        Raises:
          SearchIndexError: there is no index, no video to search, it is damaged, or the model is
            another one.
        """
        self.directory, self.model, self._engine = directory, model, engine
        with Store(directory) as store:
            self.header, known, self._arrays = store.header, store.videos(), store.arrays()
        if not made_with(self.header, model):
            raise SearchIndexError(
                f"the index {directory} was made with another model than"
                f" {' '.join(model.source.values())}; give the model of the index, or make a new"
                " index"
            )
        self.videos = [video for video in known if not video.error]
        if not self.videos:
            raise SearchIndexError(
                f"the index {directory} has no video that can be searched ({len(known)} cannot)"
            )
        # Indexes of format 3 have no checksums.
        try:
            names = jax.eval_shape(dequantize, self._arrays).keys()
        except (TypeError, ValueError) as error:
            raise damaged(directory, error) from error
        if missing := _arrays_of(model) - names:
            raise damaged(directory, f"it has no array {min(missing)}")
        first = 0
        if previous is not None and previous.header["generation"] == self.header["generation"]:
            first = previous.header["next_slot"]
        check_features(directory, self.videos, self._arrays, first_slot=first)
        self.folder = Path(self.header["videos"])
        self._video_of = {video.slot: video for video in self.videos}
        self._video_at = {video.path: video for video in self.videos}
        self._gallery = Gallery(self._arrays, list(self._video_of), model.layout)

    # ------------------------------------------------------------------ queries

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """Finds the best videos for each sentence.

        Raises:
          UserError: a sentence is blank.
        """
        text = self.model.encode_text(sentences)
        return self._explained(sentences, text, self.rank(text, top))

    def search_among(
        self, sentence: str, text: Features, videos: Sequence[IndexedVideo], top: int
    ) -> list[Hit]:
        """Finds the best of some videos for a sentence, compared as in `search`.

        Args:
          sentence: the query.
          text: its arrays, [1, ...] each.
          videos: candidates of another engine, without repetition.
          top: number of hits.
        """
        return self._explained([sentence], text, self.rank(text, top, videos))[0]

    def search_by_video(self, path: Path, top: int) -> list[Hit]:
        """Finds the videos that are most similar to a file, itself included if it is indexed.

        Raises:
          UserError: the file cannot be read.
        """
        query = self.model.interaction.video_as_text(self.model.encode_video([path]))
        ranking = self.rank(query, top)
        return [
            self._hit(rank, score, slot, None)
            for rank, (score, slot) in enumerate(
                zip(ranking.scores[0], ranking.slots[0], strict=True), start=1
            )
        ]

    def rank(
        self, text: Features, top: int, videos: Sequence[IndexedVideo] | None = None
    ) -> Ranking:
        """Ranks all videos, or some, for encoded texts."""
        if videos is None:
            return self._engine.search(text, self._gallery, top)
        slots = np.array([video.slot for video in videos])
        found = self._engine.search(text, self._gallery.only(slots), top)
        return Ranking(found.scores, slots[found.slots])

    # ------------------------------------------------------------------ videos

    def stored(self, videos: Sequence[IndexedVideo]) -> Features:
        """The arrays of indexed videos, one row per video, features float32."""
        slots = [video.slot for video in videos]
        rows = {name: np.asarray(array[slots]) for name, array in self._arrays.items()}
        return {name: np.asarray(array) for name, array in jax.device_get(dequantize(rows)).items()}

    def video_at(self, path: str) -> IndexedVideo | None:
        """The video with exactly this path relative to the folder, if it can be searched."""
        return self._video_at.get(path)

    def is_unchanged(self, video: IndexedVideo) -> bool:
        """Whether a file is the one that was indexed, by its size and modification time."""
        try:
            status = (self.folder / video.path).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (video.size, video.mtime_ns)

    def thumbnails(self, video: IndexedVideo) -> bytes:
        """A JPEG file with the frames of an indexed video side by side."""
        with Store(self.directory) as store:
            return store.thumbnails(video.path)

    def _explained(
        self, sentences: Sequence[str], text: Features, ranking: Ranking
    ) -> list[list[Hit]]:
        return [
            [
                self._hit(rank, score, slot, ({name: a[query] for name, a in text.items()}, words))
                for rank, (score, slot) in enumerate(
                    zip(ranking.scores[query], ranking.slots[query], strict=True), start=1
                )
            ]
            for query, words in enumerate(self.model.token_strings(sentences))
        ]

    def _hit(
        self, rank: int, score: float, slot: int, query: tuple[Features, list[str]] | None
    ) -> Hit:
        video = self._video_of[int(slot)]
        explanation = None
        if query is not None:
            text, words = query
            stored = {name: array[0] for name, array in self.stored([video]).items()}
            explanation = explain(self.model.interaction, text, stored, words, video.times)
        return Hit(rank, float(score), self.folder / video.path, video, explanation)


def _arrays_of(model: RetrievalModel) -> set[str]:
    """Names of the arrays of videos that the model compares."""
    definition, backbone = model_definition(model.config.model), model.config.model.backbone
    frame_feat = jax.ShapeDtypeStruct((1, 1, backbone.embed_dim), np.float32)
    frame_mask = jax.ShapeDtypeStruct((1, 1), bool)

    def encode(params: Params, frame_feat: jax.Array, frame_mask: jax.Array) -> Features:
        interaction = nnx.merge(definition, params).interaction
        return interaction.encode_video(frame_feat, frame_mask)

    return set(jax.eval_shape(encode, model.params, frame_feat, frame_mask))
