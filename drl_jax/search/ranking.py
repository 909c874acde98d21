"""Answers queries from one state of an index: finds candidates, refines them, and makes hits.

1. All coarse windows are compared with the query, exactly; or one vector of each is scanned, or an
   engine is asked, and the best are compared exactly.
2. The best of files of several windows are refined: windows that start at every frame decide the
   rank (`refine.py`).
3. The moments of the videos that are shown are found; their explanations are made when they are
   shown.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.search import CANDIDATES, MOMENTS, REFINE, SCAN_FROM
from drl_jax.search.encoding import BANK_ARRAY, Correction, gallery_scale, unusual
from drl_jax.search.engine import Gallery, Part, Ranking, SearchEngine
from drl_jax.search.hits import Explanation, Hit, Moment, explain
from drl_jax.search.open_index import IndexedVideo, OpenIndex, Videos, stored_windows
from drl_jax.search.query import EncodedQuery
from drl_jax.search.refine import Candidate, Film, Refined, refine, tighten
from drl_jax.search.windows import Window, find_spans

# Finds candidates by vectors: a state of the index, float32 [Q, D], their number -> slots of each.
FindCandidates = Callable[[OpenIndex, np.ndarray, int], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """How queries are answered.

    Attributes:
      engine: "exact" compares all windows; "scan" first compares one vector of each, and "auto"
        does where there are more than SCAN_FROM; "qdrant" asks Qdrant for candidates.
      candidates: windows that a scan or an engine finds.
      refine: windows at training pace that a query makes.
      correction: for hubs, of queries of one sentence; None: they are ranked by similarity.
    """

    engine: str = "auto"
    candidates: int = CANDIDATES
    refine: int = REFINE
    correction: Correction | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """The best windows of a query.

    Attributes:
      scores: float [N], by which videos are ranked, descending.
      slots: int64 [N], of coarse windows.
      refined: by slot, the windows that were made of candidates.
    """

    scores: np.ndarray
    slots: np.ndarray
    refined: dict[int, Refined]


class Ranker:
    """Answers encoded queries. Not safe to use from several threads at once."""

    def __init__(
        self,
        model: RetrievalModel,
        options: SearchOptions = SearchOptions(),
        ask_engine: FindCandidates | None = None,
    ):
        """Compiles nothing before the first query.

        Args:
          model: of the index.
          options: how queries are answered.
          ask_engine: finds candidates of sentences among all videos; None: no engine does.

        Raises:
          UserError: the interaction has no vectors to scan.
        """
        self.model, self.options, self.ask_engine = model, options, ask_engine
        if options.engine in ("scan", "qdrant") and not model.interaction.HAS_VECTORS:
            raise UserError(
                f"the interaction {model.config.model.interaction} has no vectors that"
                f" --engine={options.engine} can compare; use --engine=exact"
            )
        self._engine = SearchEngine(model.config.model, model.params)
        self._biases = functools.lru_cache(maxsize=1)(
            lambda index: index.biases(options.correction)
        )
        self._encoded_bank: Features | None = None

    def scans(self, index: OpenIndex) -> bool:
        """Whether candidates are found by a scan."""
        if self.options.engine != "auto":
            return self.options.engine == "scan"
        return self.model.interaction.HAS_VECTORS and len(index.gallery) > SCAN_FROM

    # ------------------------------------------------------------------ ranking

    def find(
        self,
        index: OpenIndex,
        queries: Sequence[EncodedQuery],
        top: int,
        among: Videos | None = None,
        moments: int = MOMENTS,
    ) -> list[list[Hit]]:
        """The best videos for each query, with `moments` of each at most.

        Args:
          index: state of the index.
          queries: what to look for.
          top: number of videos.
          among: only these; None: all.
          moments: of a video.
        """
        results = self.rank(index, queries, top, among)
        return [
            self.hits(index, query, found, self.videos(index, found, top), moments)
            for query, found in zip(queries, results, strict=True)
        ]

    def rank(
        self,
        index: OpenIndex,
        queries: Sequence[EncodedQuery],
        top: int,
        among: Videos | None = None,
    ) -> list[Found]:
        """The best windows for each query, of at least `top` videos if there are so many."""
        index.check()
        wanted = min(top, index.count if among is None else len(among))
        found: list[Found] = []
        for group in _groups(queries):
            gallery = self._gallery(index, group[0], among)
            count = max(wanted, self.options.refine)
            while True:
                rankings = self._coarse(index, gallery, group, count, among)
                results = [
                    self._refined(index, gallery, query, ranking)
                    for query, ranking in zip(group, rankings, strict=True)
                ]
                is_all = count >= len(gallery)
                if is_all or all(_count_videos(index, r.slots, wanted) for r in results):
                    break
                count = min(4 * count, len(gallery))  # A long video has many of the best windows.
            found += results
        return found

    def _gallery(self, index: OpenIndex, query: EncodedQuery, among: Videos | None) -> Gallery:
        gallery = index.gallery if among is None else index.gallery.only(among.valid)
        if self.options.correction is not None and query.is_sentence:
            gallery = gallery.with_biases(self._biases(index))
        return gallery

    def _coarse(
        self,
        index: OpenIndex,
        gallery: Gallery,
        queries: Sequence[EncodedQuery],
        count: int,
        among: Videos | None,
    ) -> list[Ranking]:
        """The best coarse windows of queries that are compared together."""
        parts, is_one = queries[0].parts, len(queries) == 1
        if not is_one:
            names = parts[0].text.keys()
            together = {n: np.concatenate([q.parts[0].text[n] for q in queries]) for n in names}
            parts = (Part(together),)
        asks_engine = self.ask_engine and queries[0].is_sentence and among is None
        if asks_engine or self.scans(index):
            wanted = max(count, self.options.candidates)
            vectors = _vectors(self.model, queries)
            chosen = [
                np.unique(np.concatenate(slots))
                for query in vectors
                if (
                    slots := self.ask_engine(index, query, wanted)
                    if asks_engine
                    else self._engine.scan(query, gallery, wanted)
                )
            ]
            rankings = [
                self._engine.search(query.parts, gallery.copied(slots), count)[0]
                for query, slots in zip(queries, chosen, strict=True)
            ]
        else:
            rankings = self._engine.search(parts, gallery, count, is_one=is_one)
        return [_in_order(index, ranking, count) for ranking in rankings]

    def _refined(
        self, index: OpenIndex, gallery: Gallery, query: EncodedQuery, ranking: Ranking
    ) -> Found:
        """Refines the best windows, and ranks again."""
        count = min(self.options.refine, len(ranking.slots))
        films: dict[tuple[int, int], Film] = {}
        candidates, slots = [], []
        for score, slot in zip(
            ranking.scores[:count].tolist(), ranking.slots[:count].tolist(), strict=True
        ):
            place = index.place(slot)
            listed = index.segments[place[0]]
            if np.diff(listed.segment.firsts["feature"][place[1] : place[1] + 2])[0] == 0:
                continue  # A file of one window.
            if place not in films:
                films[place] = film_of(index.video(*place))
            first = int(listed.segment.firsts["window"][place[1]]) + listed.first_slot
            bias = float(gallery.biases[slot]) if gallery.biases is not None else 0.0
            candidates.append(Candidate(films[place], slot - first, score, bias))
            slots.append(slot)
        if not candidates:
            return Found(ranking.scores, ranking.slots, {})
        found = refine(self.model, query.parts, candidates, self.options.refine)
        ranks = {slot: n for n, slot in enumerate(ranking.slots.tolist())}
        scores, refined = np.array(ranking.scores, np.float64), {}
        for slot, candidate, one in zip(slots, candidates, found, strict=True):
            scores[ranks[slot]] = one.score
            # What is shown is the similarity.
            refined[slot] = one._replace(score=one.score + candidate.bias)
        return Found(*_in_order(index, Ranking(scores, ranking.slots), len(scores)), refined)

    def videos(self, index: OpenIndex, found: Found, top: int) -> list[IndexedVideo]:
        """The videos of the best windows, each once."""
        places = dict.fromkeys(map(index.place, found.slots.tolist()))
        return [index.video(*place) for place in list(places)[:top]]

    # ------------------------------------------------------------------ hits

    def hits(
        self,
        index: OpenIndex,
        query: EncodedQuery,
        found: Found,
        videos: Sequence[IndexedVideo],
        most: int = MOMENTS,
    ) -> list[Hit]:
        """Hits in some videos, in their order, with `most` moments at most."""
        if not videos:
            return []
        slots = np.concatenate([video.slots for video in videos])
        scores = self._scores(index, query, slots)
        ends = np.cumsum([len(video.slots) for video in videos])
        parts = np.split(scores, ends[:-1])
        scale = None if query.is_sentence else self._scale(index, query)
        return [
            self._hit(index, query, found, video, rank, own, most, scale)
            for rank, (video, own) in enumerate(zip(videos, parts, strict=True), start=1)
        ]

    def _scores(self, index: OpenIndex, query: EncodedQuery, slots: np.ndarray) -> np.ndarray:
        """Similarities of windows, float32 [N], without the correction for hubs."""
        (ranking,) = self._engine.search(query.parts, index.gallery.copied(slots), len(slots))
        order = np.argsort(slots)
        scores = np.empty(len(slots), np.float32)
        scores[order[np.searchsorted(slots, ranking.slots, sorter=order)]] = ranking.scores
        return scores

    def _scale(self, index: OpenIndex, query: EncodedQuery) -> np.ndarray | None:
        """What similarities to a picture or a video mean: those of windows of the whole index."""
        return gallery_scale(self._scores(index, query, index.spread))

    def _hit(
        self,
        index: OpenIndex,
        query: EncodedQuery,
        found: Found,
        video: IndexedVideo,
        rank: int,
        scores: np.ndarray,
        most: int,
        scale: np.ndarray | None,
    ) -> Hit:
        windows, scores = list(video.windows), np.array(scores, np.float64)
        for number, slot in enumerate(video.slots.tolist()):
            if slot in found.refined:
                windows[number], scores[number] = found.refined[slot]
        bank = video.record.arrays[f"window.{BANK_ARRAY}"]
        deviation = float(bank[:, 1].mean()) if query.is_sentence else 0.0
        moments = []
        for span in find_spans(windows, scores, most, deviation):
            window = windows[span.window]
            if query.is_sentence and not moments and span[:2] == window[:2]:
                # Of the best moment alone: it takes as much as refining a candidate.
                span = span._replace(**self._tightened(index, query, video, window))
            explained = functools.partial(self._explain, query, video, window, span.window)
            unit = bank[span.window] if query.is_sentence else scale
            is_unusual = None if unit is None else unusual(span.score, unit)
            moments.append(
                Moment(span.start, span.end, span.score, window, span.window, is_unusual, explained)
            )
        path = index.folder / video.path
        return Hit(rank, path, video, tuple(moments), tuple(windows), scores)

    def _bank(self, captions: list[str]) -> Features:
        """The captions of the index's calibration, encoded once."""
        if self._encoded_bank is None:
            self._encoded_bank = self.model.encode_text(captions)
        return self._encoded_bank

    def _tightened(
        self, index: OpenIndex, query: EncodedQuery, video: IndexedVideo, window: Window
    ) -> dict[str, float]:
        """Start and end of a moment that is one window."""
        if len(video.windows) > 1:
            bank = self._bank(index.header["bank"])
            window = tighten(self.model, query.parts, bank, film_of(video), window)
        return {"start": window.start, "end": window.end}

    def _explain(
        self, query: EncodedQuery, video: IndexedVideo, window: Window, number: int
    ) -> Explanation:
        if window.frames == video.windows[number].frames:
            arrays = {name: a[number] for name, a in stored_windows(video).items()}
        else:
            encoded = self.model.encode_frame_windows(film_of(video).image_feat, [window.frames])
            arrays = {name: array[0] for name, array in encoded.items()}
        times = tuple(video.times[frame] for frame in window.frames)
        return explain(self.model.interaction, query.parts[0], arrays, query.words, times)


def film_of(video: IndexedVideo) -> Film:
    """What an index stores of a file of several windows, for `refine`."""
    arrays = video.record.arrays
    return Film(arrays["frame.time"], video.windows, arrays["feature.image_feat"])


def _groups(queries: Sequence[EncodedQuery]) -> list[list[EncodedQuery]]:
    """Sentences together, other queries alone, in their order."""
    if all(query.is_sentence for query in queries):
        return [list(queries)]
    return [[query] for query in queries]


def _vectors(model: RetrievalModel, queries: Sequence[EncodedQuery]) -> list[np.ndarray]:
    """One vector for each query, float32 [1, D]; several for the windows of a video."""
    found = []
    for query in queries:
        of_parts = [
            part.weight * model.interaction.query_vectors(part.text) for part in query.parts
        ]
        # Only a query of one part has several texts, of which the best counts.
        found.append(of_parts[0] if len(of_parts) == 1 else sum(of_parts))
    return [np.asarray(vectors, np.float32) for vectors in found]


def _count_videos(index: OpenIndex, slots: np.ndarray, wanted: int) -> bool:
    """Whether windows are of at least so many videos."""
    return len({index.place(slot) for slot in slots.tolist()}) >= wanted


def _in_order(index: OpenIndex, ranking: Ranking, count: int) -> Ranking:
    """Orders equal scores by path and window."""
    order = np.argsort(-ranking.scores, kind="stable")
    scores, slots = ranking.scores[order], ranking.slots[order]
    if (scores[1:] == scores[:-1]).any():
        paths = [index.path_of(index.place(slot)) for slot in slots.tolist()]
        order = sorted(range(len(slots)), key=lambda n: (-scores[n], paths[n], slots[n]))
        scores, slots = scores[order], slots[order]
    return Ranking(scores[:count], slots[:count])
