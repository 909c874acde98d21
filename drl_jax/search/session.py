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
from drl_jax.search.moments import Span, find_spans
from drl_jax.search.quantization import dequantize
from drl_jax.search.rows import IndexedVideo, SearchIndexError, check_features, damaged
from drl_jax.search.store import Store
from drl_jax.search.thumbnails import thumbnails

# Moments of a video that a hit has at most.
MOMENTS = 3


@dataclasses.dataclass(frozen=True)
class Moment:
    """A part of a video that answers a query.

    Attributes:
      start: seconds.
      end: seconds.
      peak: time of the frame that contributes most to the score, seconds.
      score: similarity of its best window, as evaluation computes it.
      window: index of its best window.
      explanation: of its best window; None if the query is a video.
    """

    start: float
    end: float
    peak: float
    score: float
    window: int
    explanation: Explanation | None

    def to_json(self) -> dict[str, Any]:
        """The moment as `--json` prints it; times in seconds."""
        found: dict[str, Any] = {
            "start": round(self.start, 3),
            "end": round(self.end, 3),
            "peak": round(self.peak, 3),
            "score": round(self.score, 6),
        }
        if self.explanation is not None:
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


@dataclasses.dataclass(frozen=True)
class Hit:
    """A video that a query found.

    Attributes:
      rank: from 1.
      path: of the file.
      video: the file in the index.
      moments: its best parts, the best first; at least one.
      scores: float32 [W], of all its windows.
    """

    rank: int
    path: Path
    video: IndexedVideo
    moments: tuple[Moment, ...]
    scores: np.ndarray

    @property
    def score(self) -> float:
        """Similarity of its best window."""
        return self.moments[0].score

    def to_json(self) -> dict[str, Any]:
        """The hit as `--json` prints it."""
        return {
            "rank": self.rank,
            "score": round(self.score, 6),
            "path": str(self.path),
            "duration": round(self.video.duration, 3),
            "moments": [moment.to_json() for moment in self.moments],
        }


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
        self._video_at = {video.path: video for video in self.videos}
        # In the order of their slots, to find the video of a slot by bisection.
        self._by_slot = sorted(self.videos, key=lambda video: video.slot)
        self._first_slots = np.array([video.slot for video in self._by_slot])
        slots = np.concatenate([np.arange(v.slot, v.slots.stop) for v in self._by_slot])
        self._gallery = Gallery(self._arrays, slots, model.layout)

    # ------------------------------------------------------------------ queries

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """Finds the best videos for each sentence.

        Raises:
          UserError: a sentence is blank.
        """
        text = self.model.encode_text(sentences)
        words = self.model.token_strings(sentences)
        return [
            self._hits({name: a[[query]] for name, a in text.items()}, words[query], videos)
            for query, videos in enumerate(self.best_videos(text, top))
        ]

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
        (best,) = self.best_videos(text, top, videos)
        return self._hits(text, self.model.token_strings([sentence])[0], best)

    def search_by_video(self, path: Path, top: int) -> list[Hit]:
        """Finds the videos that are most similar to a file, itself included if it is indexed.

        Raises:
          UserError: the file cannot be read.
        """
        query = self.model.interaction.video_as_text(self.model.encode_video([path]))
        (best,) = self.best_videos(query, top)
        return self._hits(query, None, best)

    def rank(
        self, text: Features, top: int, videos: Sequence[IndexedVideo] | None = None
    ) -> Ranking:
        """Ranks the windows of all videos, or of some, for encoded texts."""
        if videos is None:
            return self._engine.search(text, self._gallery, top)
        slots = _slots_of(videos)
        found = self._engine.search(text, self._gallery.only(slots), top)
        return Ranking(found.scores, slots[found.slots])

    def best_videos(
        self, text: Features, top: int, videos: Sequence[IndexedVideo] | None = None
    ) -> list[list[IndexedVideo]]:
        """The videos with the best windows for each encoded text, the best first.

        Args:
          text: arrays of Q texts.
          top: number of videos.
          videos: only these; None: all.
        """
        among = self.videos if videos is None else videos
        windows = sum(len(video.windows) for video in among)
        wanted, count = min(top, len(among)), min(top, windows)
        while True:
            slots = self.rank(text, count, videos).slots
            best = [self._videos_of(row)[:wanted] for row in slots]
            if count == windows or all(len(found) == wanted for found in best):
                return best
            # A long video has many of the best windows.
            count = min(4 * count, windows)

    def window_scores(self, text: Features, videos: Sequence[IndexedVideo]) -> list[np.ndarray]:
        """Scores of all windows of some videos for one encoded text: float32 [W] each."""
        slots = _slots_of(videos)
        ranking = self._engine.search(text, self._gallery.only(slots), len(slots))
        scores = np.empty(len(slots), np.float32)
        scores[ranking.slots[0]] = ranking.scores[0]
        return np.split(scores, np.cumsum([len(video.windows) for video in videos])[:-1])

    def _videos_of(self, slots: np.ndarray) -> list[IndexedVideo]:
        """The videos of slots, each once."""
        rows = np.searchsorted(self._first_slots, slots, side="right") - 1
        return [self._by_slot[row] for row in dict.fromkeys(rows.tolist())]

    # ------------------------------------------------------------------ videos

    def stored(self, videos: Sequence[IndexedVideo]) -> Features:
        """The arrays of indexed videos, one row per window, features float32."""
        return self._stored_rows(_slots_of(videos))

    def stored_windows(self, windows: Sequence[tuple[IndexedVideo, int]]) -> Features:
        """The arrays of windows, given as videos and numbers; features float32."""
        return self._stored_rows([video.slot + number for video, number in windows])

    def _stored_rows(self, slots: Sequence[int]) -> Features:
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

    def thumbnails(self, video: IndexedVideo, window: int = 0) -> bytes:
        """A JPEG file with the frames of a window of an indexed video side by side."""
        return self.frames_of(video, video.windows[window].frames)

    def frames_of(self, video: IndexedVideo, frames: Sequence[int]) -> bytes:
        """A JPEG file with thumbnails of some frames of an indexed video side by side."""
        with Store(self.directory) as store:
            return thumbnails(store, video, frames)

    def _hits(
        self, text: Features, words: list[str] | None, videos: Sequence[IndexedVideo]
    ) -> list[Hit]:
        """Hits of one encoded text; `words` are its tokens, None for a query by video."""
        if not videos:
            return []
        hits = []
        scored = zip(videos, self.window_scores(text, videos), strict=True)
        for rank, (video, scores) in enumerate(scored, start=1):
            spans = find_spans(video.windows, scores, MOMENTS)
            moments = tuple(self._moment(video, span, text, words) for span in spans)
            hits.append(Hit(rank, self.folder / video.path, video, moments, scores))
        return hits

    def _moment(
        self, video: IndexedVideo, span: Span, text: Features, words: list[str] | None
    ) -> Moment:
        window = video.windows[span.window]
        times = tuple(video.times[frame] for frame in window.frames)
        explanation, peak = None, times[len(times) // 2]
        if words is not None:
            stored = self._stored_rows([video.slot + span.window])
            explanation = explain(
                self.model.interaction,
                {name: array[0] for name, array in text.items()},
                {name: array[0] for name, array in stored.items()},
                words,
                times,
            )
            peak = explanation.moment
        return Moment(span.start, span.end, peak, span.score, span.window, explanation)


def _slots_of(videos: Sequence[IndexedVideo]) -> np.ndarray:
    """Slots of all windows of some videos, in order."""
    return np.concatenate([np.arange(video.slot, video.slots.stop) for video in videos])


def _arrays_of(model: RetrievalModel) -> set[str]:
    """Names of the arrays of videos that the model compares."""
    definition, backbone = model_definition(model.config.model), model.config.model.backbone
    frame_feat = jax.ShapeDtypeStruct((1, 1, backbone.embed_dim), np.float32)
    frame_mask = jax.ShapeDtypeStruct((1, 1), bool)

    def encode(params: Params, frame_feat: jax.Array, frame_mask: jax.Array) -> Features:
        interaction = nnx.merge(definition, params).interaction
        return interaction.encode_video(frame_feat, frame_mask)

    return set(jax.eval_shape(encode, model.params, frame_feat, frame_mask))
