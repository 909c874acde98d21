"""One state of an index, which answers queries with explained hits."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.search import MOMENTS
from drl_jax.search.calibration import BANK_ARRAY, unusual
from drl_jax.search.engine import Gallery, Ranking, SearchEngine, compared_arrays
from drl_jax.search.explain import explain
from drl_jax.search.filters import Filters, filter_videos
from drl_jax.search.format_2 import made_with
from drl_jax.search.hits import Hit, Moment
from drl_jax.search.hubness import HUBNESS_ARRAY, Correction
from drl_jax.search.integrity import IndexCheck
from drl_jax.search.moments import Span, find_spans
from drl_jax.search.progress import read_progress
from drl_jax.search.quantization import dequantize
from drl_jax.search.query import EncodedQuery, Query, encode_query, encode_sentences
from drl_jax.search.rows import IndexedVideo, SearchIndexError, damaged
from drl_jax.search.store import Store
from drl_jax.search.thumbnails import thumbnails
from drl_jax.search.videos import IndexedVideos, slots_of
from drl_jax.search.windows import window_at

# Videos with more than this share of the windows are searched in place, fewer are copied.
_MANY = 0.25


class IndexSnapshot:
    """One state of an index, ready for queries.

    Attributes:
      directory: of the index.
      header: what the index was made with.
      folder: folder of the videos.
      videos: the videos that can be found.
      unsearchable_count: number of the other files.
      check: of the index; see `IndexCheck`.
      model: the model of the index.
    """

    def __init__(
        self,
        directory: Path,
        model: RetrievalModel,
        engine: SearchEngine,
        previous: "IndexSnapshot | None" = None,
        correction: Correction | None = None,
    ):
        """Reads the slots of the videos, maps the arrays, and checks them by their checksums.

        Args:
          directory: of the index.
          model: the model of the index.
          engine: compares texts and videos with that model.
          previous: an earlier state of the same index; what it has checked is not checked again.
          correction: for hubs, of queries of one sentence.

        Raises:
          SearchIndexError: there is no index, no video to search, it is damaged, or the model is
            another one.
        """
        self.directory, self.model, self._engine = directory, model, engine
        with Store(directory) as store:
            self.header, self._arrays = store.header, store.arrays()
            generation = self.header["generation"]
            self.videos = IndexedVideos(directory, generation, *store.slots())
            self.unsearchable_count = store.count() - len(self.videos)
        if not made_with(self.header, model):
            raise SearchIndexError(
                f"the index {directory} was made with another model than"
                f" {' '.join(model.source.values())}; give the model of the index, or make a new"
                " index"
            )
        if not self.videos:
            progress = read_progress(directory)
            raise SearchIndexError(
                f"the index {directory} has no video that can be searched"
                f" ({self.unsearchable_count} cannot)"
                if progress is None
                else f"the index {directory} is being made ({progress.done} of {progress.total}"
                " files are read), and no video is stored yet; try again in a few seconds"
            )
        self._bank = self._arrays.pop(BANK_ARRAY, None)
        self._hubness = self._arrays.pop(HUBNESS_ARRAY, None)
        # Indexes of format 3 have no checksums.
        try:
            names = jax.eval_shape(dequantize, self._arrays).keys()
        except (TypeError, ValueError) as error:
            raise damaged(directory, error) from error
        if missing := compared_arrays(model.config.model, model.params) - names:
            raise damaged(directory, f"it has no array {min(missing)}")
        self.folder = Path(self.header["videos"])
        self._gallery = Gallery(self._arrays, self.videos.slots, model.layout)
        self._biases = None if correction is None else self._biases_of(correction)
        # Ranks sentences.
        self._corrected = (
            self._gallery if self._biases is None else self._gallery.with_biases(self._biases)
        )
        checked = 0
        if previous is not None and previous.header["generation"] == generation:
            previous.check.stop()
            checked = previous.check.checked
        self.check = IndexCheck(
            directory, self.videos, self._stored_arrays(), self._check_files, first_slot=checked
        )

    def _biases_of(self, correction: Correction) -> np.ndarray:
        if self._hubness is None:
            raise SearchIndexError(
                f"the index {self.directory} has no bank of captions, which --hubness needs; make"
                " a new one with: python -m drl_jax.search index --bank=train|FILE"
            )
        return correction.biases(self.directory, self.header, self._hubness)

    # ------------------------------------------------------------------ queries

    def search(self, sentences: Sequence[str], top: int) -> list[list[Hit]]:
        """Finds the best videos for each sentence.

        Raises:
          UserError: a sentence is blank or too long.
        """
        queries = encode_sentences(self.model, sentences)
        names = queries[0].parts.keys()
        together = {n: np.concatenate([query.parts[n] for query in queries]) for n in names}
        best = self.best_videos(together, top)
        return [self.hits(query, videos) for query, videos in zip(queries, best, strict=True)]

    def answer(
        self,
        query: Query,
        top: int,
        videos: Sequence[IndexedVideo] | None = None,
        *,
        moments: int = MOMENTS,
    ) -> list[Hit]:
        """Finds the best videos for a query of any kind.

        Args:
          query: what to look for.
          top: number of hits.
          videos: only these; None: all.
          moments: of a hit, at most.

        Raises:
          UserError: the query is empty, or a part of it cannot be read.
        """
        encoded = self.encoded(query)
        return self.hits(encoded, self.best_of(encoded, top, videos), moments)

    def encoded(self, query: Query) -> EncodedQuery:
        """Encodes a query; see `answer`."""
        stored = None
        if query.like is not None:
            video, time = query.like
            stored = self.stored_windows([(video, window_at(video.windows, time))])
        return encode_query(self.model, query, stored)

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
        query = EncodedQuery(text, (1.0,), self.model.token_strings([sentence])[0], True)
        return self.hits(query, self.best_of(query, top, videos))

    def search_by_video(self, path: Path, top: int) -> list[Hit]:
        """Finds the videos that are most similar to a file, itself included if it is indexed.

        Raises:
          UserError: the file cannot be read.
        """
        return self.answer(Query(video=path), top)

    def rank(
        self,
        text: Features,
        top: int,
        videos: Sequence[IndexedVideo] | None = None,
        weights: Sequence[float] | str | None = None,
        *,
        are_sentences: bool = True,
    ) -> Ranking:
        """Ranks the windows of all videos, or of some; see `SearchEngine.search`.

        The scores of sentences are corrected for hubs if the snapshot does that.
        """
        gallery = self._corrected if are_sentences else self._gallery
        self._check_files()
        self.check.raise_damage()
        if videos is None:
            return self._engine.search(text, gallery, top, weights)
        slots = slots_of(videos)
        if len(slots) > _MANY * gallery.size:
            return self._engine.search(text, gallery.only(slots), top, weights)
        found = self._engine.search(text, gallery.copied(slots), top, weights)
        return Ranking(found.scores, slots[found.slots])

    def _stored_arrays(self) -> Features:
        """All arrays of the index, with those of the banks of captions if there are some."""
        of_banks = {BANK_ARRAY: self._bank, HUBNESS_ARRAY: self._hubness}
        return self._arrays | {n: array for n, array in of_banks.items() if array is not None}

    def _check_files(self) -> None:
        """Checks that no mapped file was cut: reading behind its end would end the process."""
        for name, array in self._stored_arrays().items():
            path = self.directory / self.header["arrays"][name]["file"]
            try:
                is_cut = path.stat().st_size < array.nbytes
            # Another process removes the files of an older generation; they stay mapped.
            except FileNotFoundError:
                continue
            if is_cut:
                raise damaged(self.directory, f"the file of {name} was cut", can_heal=True)

    def best_videos(
        self,
        text: Features,
        top: int,
        videos: Sequence[IndexedVideo] | None = None,
        weights: Sequence[float] | str | None = None,
        *,
        are_sentences: bool = True,
    ) -> list[list[IndexedVideo]]:
        """The videos with the best windows for each encoded text, the best first.

        Args:
          text: arrays of Q texts.
          top: number of videos.
          videos: only these; None: all.
          weights: of the Q texts, if they are one query.
          are_sentences: whether each text is a sentence; see `rank`.
        """
        among = self.videos if videos is None else videos
        if not among:
            return [[]]
        windows = len(slots_of(among))
        wanted, count = min(top, len(among)), min(top, windows)
        while True:
            ranking = self.rank(text, count, videos, weights, are_sentences=are_sentences)
            slots = ranking.slots
            best = [self.videos.at_slots(row, wanted) for row in slots]
            if count == windows or all(len(found) == wanted for found in best):
                return best
            # A long video has many of the best windows.
            count = min(4 * count, windows)

    def window_scores(
        self, query: EncodedQuery, videos: Sequence[IndexedVideo]
    ) -> list[np.ndarray]:
        """Scores of all windows of some videos for one query: float32 [W] each."""
        self._check_files()
        self.check.check_now(videos)
        slots = slots_of(videos)
        gallery = self._gallery.copied(slots)
        ranking = self._engine.search(query.parts, gallery, len(slots), _weights_of(query))
        scores = np.empty(len(slots), np.float32)
        scores[ranking.slots[0]] = ranking.scores[0]
        return np.split(scores, np.cumsum([len(video.windows) for video in videos])[:-1])

    def best_of(
        self, query: EncodedQuery, top: int, videos: Sequence[IndexedVideo] | None = None
    ) -> list[IndexedVideo]:
        """The videos with the best windows for an encoded query, the best first."""
        (found,) = self.best_videos(
            query.parts, top, videos, _weights_of(query), are_sentences=query.is_sentence
        )
        return found

    # ------------------------------------------------------------------ videos

    def stored(self, videos: Sequence[IndexedVideo]) -> Features:
        """The arrays of indexed videos, one row per window, features float32."""
        return self._stored_rows(slots_of(videos))

    def stored_windows(self, windows: Sequence[tuple[IndexedVideo, int]]) -> Features:
        """The arrays of windows, given as videos and numbers; features float32."""
        return self._stored_rows([video.slot + number for video, number in windows])

    def biases_of_windows(self, windows: Sequence[tuple[IndexedVideo, int]]) -> np.ndarray:
        """What the correction for hubs subtracts from the scores of windows: float32 [W]."""
        return self._biases[[video.slot + number for video, number in windows]]

    def _stored_rows(self, slots: Sequence[int]) -> Features:
        rows = {name: np.asarray(array[slots]) for name, array in self._arrays.items()}
        return {name: np.asarray(array) for name, array in jax.device_get(dequantize(rows)).items()}

    def unsearchable(self) -> list[IndexedVideo]:
        """The files that cannot be searched, with the reason in `error`, by their paths."""
        with Store(self.directory) as store:
            return store.unsearchable()

    def video_at(self, path: str) -> IndexedVideo | None:
        """The video with exactly this path relative to the folder, if it can be searched."""
        return self.videos.at_path(path)

    def filtered(self, filters: Filters) -> IndexedVideos:
        """The videos that pass filters."""
        listing = filter_videos(self.videos.listing(), filters)
        return self.videos.only([video.slot for video in listing])

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

    def hits(
        self, query: EncodedQuery, videos: Sequence[IndexedVideo], most: int = MOMENTS
    ) -> list[Hit]:
        """Hits of an encoded query in some videos, in their order, with `most` moments at most."""
        if not videos:
            return []
        hits = []
        scored = zip(videos, self.window_scores(query, videos), strict=True)
        for rank, (video, scores) in enumerate(scored, start=1):
            spans = find_spans(video.windows, scores, most)
            moments = tuple(self._moment(video, span, query) for span in spans)
            hits.append(Hit(rank, self.folder / video.path, video, moments, scores))
        return hits

    def _moment(self, video: IndexedVideo, span: Span, query: EncodedQuery) -> Moment:
        times = tuple(video.times[frame] for frame in video.windows[span.window].frames)
        rows = self.stored_windows([(video, span.window)])
        stored = {name: array[0] for name, array in rows.items()}
        explanations = [
            explain(self.model.interaction, part, stored, query.words, times)
            for part in query.explaining
        ]
        # Of the windows of a video that is a query, the one that the score is of.
        explanation = max(explanations, key=lambda e: e.attribution.frame_contribution.sum())
        # The bank has sentences: other queries have other similarities.
        is_sentence = query.is_sentence and self._bank is not None
        return Moment(
            start=span.start,
            end=span.end,
            peak=explanation.moment,
            score=span.score,
            window=span.window,
            explanation=explanation,
            unusual=(
                unusual(span.score, self._bank[video.slot + span.window]) if is_sentence else None
            ),
        )


def _weights_of(query: EncodedQuery) -> Sequence[float] | str | None:
    """Weights of the parts; None for one part, whose score then has the bits of evaluation."""
    return None if query.weights == (1.0,) else query.weights
