"""One state of an index, which answers queries with explained hits."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.search import MOMENTS
from drl_jax.search.calibration import unusual
from drl_jax.search.engine import Gallery, Ranking, SearchEngine
from drl_jax.search.explain import explain
from drl_jax.search.hits import Hit, Moment
from drl_jax.search.hubness import Correction
from drl_jax.search.integrity import IndexCheck
from drl_jax.search.moments import Span, find_spans
from drl_jax.search.open_index import OpenIndex
from drl_jax.search.query import EncodedQuery, Query, encode_query, encode_sentences
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.videos import count_windows, slots_of
from drl_jax.search.windows import window_at

# Videos with more than this share of the windows are searched in place, fewer are copied.
_MANY = 0.25


class IndexSnapshot(OpenIndex):
    """One state of an index, ready for queries.

    Attributes:
      check: of the index; see `IndexCheck`.
    """

    def __init__(
        self,
        directory: Path,
        model: RetrievalModel,
        engine: SearchEngine,
        previous: "IndexSnapshot | None" = None,
        correction: Correction | None = None,
        versions: Mapping[Path, tuple[int, ...]] | None = None,
    ):
        """Reads the slots of the videos, maps the arrays, and checks them by their checksums.

        Args:
          directory: of the index.
          model: the model of the index.
          engine: compares texts and videos with that model.
          previous: an earlier state of the same index, with the same parts; what it has checked is
            not checked again.
          correction: for hubs, of queries of one sentence.
          versions: `part_versions` of the index; None: read now.

        Raises:
          SearchIndexError: there is no index, no video to search, it is damaged, or the model is
            another one.
        """
        super().__init__(directory, model, previous, correction, versions)
        self._engine = engine
        self._gallery = Gallery(
            [part.arrays for part in self.parts], self.videos.slots, model.layout
        )
        # Ranks sentences.
        self._corrected = (
            self._gallery if self.biases is None else self._gallery.with_biases(self.biases)
        )
        self.check = IndexCheck(self.parts, None if previous is None else previous.check)

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

    def best_among(self, text: Features, slots: np.ndarray, top: int) -> list[IndexedVideo]:
        """The videos with the best of some windows for a sentence, compared as in `search`.

        Args:
          text: arrays of the sentence, [1, ...] each.
          slots: int [W], windows: candidates of another engine, each once.
          top: number of videos.
        """
        ranking = self.rank_windows(text, len(slots), slots)
        return self.videos.at_slots(ranking.slots[0], top)

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
        slots = None if videos is None else slots_of(videos)
        return self.rank_windows(text, top, slots, weights, are_sentences=are_sentences)

    def rank_windows(
        self,
        text: Features,
        top: int,
        slots: np.ndarray | None,
        weights: Sequence[float] | str | None = None,
        *,
        are_sentences: bool = True,
    ) -> Ranking:
        """Ranks windows, given by their slots; see `rank`."""
        gallery = self._corrected if are_sentences else self._gallery
        self.check_files()
        self.check.raise_damage()
        if slots is None:
            return self._engine.search(text, gallery, top, weights)
        if len(slots) > _MANY * gallery.size:
            return self._engine.search(text, gallery.only(slots), top, weights)
        found = self._engine.search(text, gallery.copied(slots), top, weights)
        return Ranking(found.scores, slots[found.slots])

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
        windows = count_windows(among)
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
        self.check_files()
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
        return Moment(
            start=span.start,
            end=span.end,
            peak=explanation.moment,
            score=span.score,
            window=span.window,
            explanation=explanation,
            # The bank has sentences: other queries have other similarities.
            unusual=self._unusual(video, span) if query.is_sentence else None,
        )

    def _unusual(self, video: IndexedVideo, span: Span) -> float | None:
        bank = self.bank_row(video.slot + span.window)
        return None if bank is None else unusual(span.score, bank)


def _weights_of(query: EncodedQuery) -> Sequence[float] | str | None:
    """Weights of the parts; None for one part, whose score then has the bits of evaluation."""
    return None if query.weights == (1.0,) else query.weights
