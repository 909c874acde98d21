"""Ranks queries in one state of an index, and makes hits of what they find.

1. All coarse windows are compared exactly; or only those that a scan or an engine finds.
2. The best of files of several windows are refined (`refine.py`), which decides the rank.
3. A reranker, if it is asked for, orders the first videos anew, by the best window of each.
4. The moments of the videos that are shown are found, and explained when they are shown.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from drl_jax.evaluation.reranking import check_candidates
from drl_jax.models.interactions import Features
from drl_jax.pretrained.model import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.search import CANDIDATES, MOMENTS, REFINE, SCAN_FROM
from drl_jax.search.encoding import BANK_ARRAY, Correction, dequantize, gallery_scale, unusual
from drl_jax.search.engine import Gallery, Part, Ranking, SearchEngine
from drl_jax.search.hits import Explanation, Hit, Moment, explain
from drl_jax.search.open_index import IndexedVideo, OpenIndex, Place, Videos, stored_windows
from drl_jax.search.query import EncodedQuery
from drl_jax.search.reading import file_of
from drl_jax.search.refine import Candidate, Film, encode, refine, tighten
from drl_jax.search.windows import Window, find_spans

# Finds candidates by vectors: a state of the index, float32 [Q, D], their number -> slots of each.
FindCandidates = Callable[[OpenIndex, np.ndarray, int], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """How queries are answered."""

    # "exact" compares all windows; "scan" first compares one vector of each, and "auto" does where
    # there are more than SCAN_FROM; "qdrant" asks Qdrant for candidates.
    engine: str = "auto"
    candidates: int = CANDIDATES
    refine: int = REFINE
    correction: Correction | None = None  # Of queries of one sentence.
    rerank: int = 0  # Videos that the reranker of the model orders anew, of these queries.


class Ranker:
    """Ranks encoded queries. Not safe to use from several threads at once."""

    def __init__(
        self, model: RetrievalModel, options: SearchOptions, ask_engine: FindCandidates | None
    ):
        self.model, self.options, self._ask_engine = model, options, ask_engine
        if options.engine in ("scan", "qdrant") and not model.interaction.HAS_VECTORS:
            raise UserError(
                f"the interaction {model.config.model.interaction} has no vectors that"
                f" engine={options.engine} can compare; use engine=exact"
            )
        self.engine = SearchEngine(model.config.model, model.params)
        self.bank = functools.lru_cache(1)(model.encode_text)
        self._biases = functools.lru_cache(1)(lambda index: index.biases(options.correction))

    def reranked(self, index: OpenIndex, count: int | None) -> int:
        """How many videos are reranked; a UserError if so many cannot.

        None: `options.rerank`, or all of an index that has fewer by now.
        """
        if count is None:
            return min(self.options.rerank, index.count)
        if count:
            check_candidates(count, index.count, "the index")
            _ = self.model.reranker  # It is there.
        return count

    def scans(self, index: OpenIndex) -> bool:
        if self.options.engine != "auto":
            return self.options.engine == "scan"
        return self.model.interaction.HAS_VECTORS and len(index.gallery) > SCAN_FROM

    def rank(
        self,
        index: OpenIndex,
        queries: Sequence[EncodedQuery],
        top: int,
        among: Videos | None,
        rerank: int = 0,
    ) -> list["Answer"]:
        """Ranks one query or several sentences until `top` videos of `among` are found, or all.

        The first `rerank` of them are reranked, of sentences.
        """
        answers = self._rank(index, queries, max(top, rerank), among)
        for answer in answers if rerank and queries[0].is_sentence else ():
            answer.rerank(rerank)
        return answers

    def _rank(
        self, index: OpenIndex, queries: Sequence[EncodedQuery], top: int, among: Videos | None
    ) -> list["Answer"]:
        index.check()
        wanted = min(top, index.count if among is None else len(among))
        gallery = self.gallery(index, queries[0], among)
        count = max(wanted, self.options.refine)
        while True:
            pairs = zip(queries, self._coarse(index, gallery, queries, count), strict=True)
            answers = [Answer(self, index, *pair, gallery.biases) for pair in pairs]
            enough = [count >= len(gallery) or len(one.places()) >= wanted for one in answers]
            if all(enough):
                return answers
            if len(queries) > 1:  # What a query finds does not depend on the others.
                pairs = zip(queries, answers, enough, strict=True)
                return [one if e else self._rank(index, [q], top, among)[0] for q, one, e in pairs]
            count = min(4 * count, len(gallery))  # A long video has many of the best windows.

    def gallery(self, index: OpenIndex, query: EncodedQuery, among: Videos | None) -> Gallery:
        is_corrected = self.options.correction is not None and query.is_sentence
        valid = index.valid if among is None else among.valid
        return index.gallery.only(valid, self._biases(index) if is_corrected else None)

    def candidates(
        self, index: OpenIndex, gallery: Gallery, queries: Sequence[EncodedQuery], count: int
    ) -> list[np.ndarray]:
        """Slots of the windows that the engine or one scan finds, `count` for each text, int64."""
        query_vectors = self.model.interaction.query_vectors
        # Only a query of one part has several texts, of which the best counts.
        vectors = [
            np.asarray(sum(part.weight * query_vectors(part.text) for part in query.parts))
            for query in queries
        ]
        together = np.concatenate(vectors, dtype=np.float32)
        if self._asks(index, gallery, queries[0]):
            found = iter(self._ask_engine(index, together, count))
        else:
            found = iter(self.engine.scan(together, gallery, count))
        of_queries = (itertools.islice(found, len(of_query)) for of_query in vectors)
        return [np.unique(np.concatenate(list(slots))) for slots in of_queries]

    def _asks(self, index: OpenIndex, gallery: Gallery, query: EncodedQuery) -> bool:
        is_all = gallery.valid is index.valid
        return self._ask_engine is not None and query.is_sentence and is_all

    def _coarse(
        self, index: OpenIndex, gallery: Gallery, queries: Sequence[EncodedQuery], count: int
    ) -> list[Ranking]:
        if self._asks(index, gallery, queries[0]) or self.scans(index):
            most = max(count, self.options.candidates)
            found = self.candidates(index, gallery, queries, most)
            pairs = zip(queries, map(gallery.copied, found), strict=True)
            return [self.engine.search(query.parts, some, count)[0] for query, some in pairs]
        if len(queries) == 1:
            return self.engine.search(queries[0].parts, gallery, count)
        texts = [query.parts[0].text for query in queries]
        together = {name: np.concatenate([text[name] for text in texts]) for name in texts[0]}
        return self.engine.search([Part(together)], gallery, count, is_one=False)


class Answer:
    """The best windows of a query in a state of an index, ranked: scores [N] and slots [N].

    `refined` are, by slot, the windows that were made of candidates, and their similarities;
    `reranked`, by place, the scores of videos that a reranker ordered, the best first.
    """

    def __init__(
        self,
        ranker: Ranker,
        index: OpenIndex,
        query: EncodedQuery,
        ranking: Ranking,
        biases: np.ndarray | None,
    ):
        self._ranker, self._index, self._query = ranker, index, query
        self._biases, self.refined = biases, dict[int, tuple[Window, float]]()
        self.reranked, self.rerank_ms = dict[Place, float](), None
        self._sort(*ranking)
        if candidates := self._candidates():
            most, scores = ranker.options.refine, self.scores.astype(np.float64)
            found = refine(ranker.model, query.parts, [*candidates.values()], most)
            for row, (window, score) in zip(candidates, found, strict=True):
                slot = int(self.slots[row])
                self.refined[slot] = window, score
                scores[row] = score - self._bias(slot)
            self._sort(scores, self.slots)

    def _bias(self, slot: int) -> float:
        return 0.0 if self._biases is None else float(self._biases[slot])

    def _sort(self, scores: np.ndarray, slots: np.ndarray) -> None:
        """By score; equal scores by path and window."""
        order = np.argsort(-scores, kind="stable")
        scores, slots = scores[order], slots[order]
        if (scores[1:] == scores[:-1]).any():
            paths = [self._index.path_of(self._index.place(slot)) for slot in slots.tolist()]
            order = sorted(range(len(slots)), key=lambda n: (-scores[n], paths[n], slots[n]))
            scores, slots = scores[order], slots[order]
        self.scores, self.slots = scores, slots

    def _candidates(self) -> dict[int, Candidate]:
        """The best windows by row, without those of files of one window."""
        index, found = self._index, {}
        film_of = functools.cache(lambda *place: _film_of(index.video(*place)))
        for row, slot in enumerate(self.slots[: self._ranker.options.refine].tolist()):
            number, video = index.place(slot)
            one = index.segments[number]
            windows, features = (one.segment.firsts[name] for name in ("window", "feature"))
            if features[video] < features[video + 1]:
                window = slot - one.first_slot - int(windows[video])
                score = float(self.scores[row]) + self._bias(slot)
                found[row] = Candidate(film_of(number, video), window, score)
        return found

    def places(self) -> list[tuple[int, int]]:
        """Segment and row of the videos of these windows, each once."""
        return list(dict.fromkeys([*self.reranked, *map(self._index.place, self.slots.tolist())]))

    def rerank(self, count: int) -> None:
        """Orders the first `count` videos anew, by the best window of each."""
        start, index, best = time.perf_counter(), self._index, dict[Place, int]()
        for row, slot in enumerate(self.slots.tolist()):
            best.setdefault(index.place(slot), row)
            if len(best) == count:
                break
        rows = np.array([*best.values()])
        slots = self.slots[rows].tolist()
        features = self._features(slots)
        (changes,) = self._ranker.model.reranker.changes(self._query.parts[0].text, features)
        # Without a change, the order of the first stage, bit for bit.
        places, scores = [*best], self.scores[rows] + changes
        for number in np.argsort(-scores, kind="stable").tolist():
            self.reranked[places[number]] = float(scores[number])
        self.rerank_ms = 1000 * (time.perf_counter() - start)

    def _features(self, slots: list[int]) -> Features:
        """Arrays of stored windows, or of the refined ones that took their places."""
        names = self._ranker.model.interaction.VIDEO_ARRAYS
        stored = self._index.gallery.take(np.array(slots))
        stored = {n: a for n, a in stored.items() if n.removesuffix(".scale") in names}
        found = {n: np.array(a) for n, a in jax.device_get(dequantize(stored)).items()}
        made = {}
        for row, slot in enumerate(slots):
            if slot in self.refined:
                video, (window, _) = self._index.video(*self._index.place(slot)), self.refined[slot]
                if window.frames != video.windows[slot - video.slot].frames:
                    made[row] = _film_of(video), window
        if made:
            encoded = encode(self._ranker.model, [*made.values()])
            for name, array in found.items():
                array[[*made]] = encoded[name]
        return found

    def videos(self, top: int) -> list[IndexedVideo]:
        return [self._index.video(*place) for place in self.places()[:top]]

    def hits(self, videos: Sequence[IndexedVideo], most: int = MOMENTS) -> list[Hit]:
        """Hits in some videos, in their order, with `most` moments at most."""
        if not videos:
            return []
        scores = self._similarities(np.concatenate([video.slots for video in videos]))
        ends = np.cumsum([len(video.slots) for video in videos])
        of_videos = zip(videos, np.split(scores, ends[:-1]), strict=True)
        return [self._hit(rank, *video, most) for rank, video in enumerate(of_videos, start=1)]

    def _similarities(self, slots: np.ndarray) -> np.ndarray:
        """Similarities of windows, float32 [N], without the correction for hubs."""
        gallery = self._index.gallery.copied(slots)
        (ranking,) = self._ranker.engine.search(self._query.parts, gallery, len(slots))
        scores = np.empty(len(slots), np.float32)
        scores[np.argsort(slots)] = ranking.scores[np.argsort(ranking.slots)]
        return scores

    @functools.cached_property
    def _scale(self) -> np.ndarray | None:
        """What similarities to a picture or a video mean: those of windows of the whole index."""
        return gallery_scale(self._similarities(self._index.spread))

    def _hit(self, rank: int, video: IndexedVideo, scores: np.ndarray, most: int) -> Hit:
        model, windows = self._ranker.model, list(video.windows)
        scores = scores.astype(np.float64)
        for number, slot in enumerate(video.slots.tolist()):
            if slot in self.refined:
                windows[number], scores[number] = self.refined[slot]
        scales = video.record.arrays[f"window.{BANK_ARRAY}"]
        is_sentence = self._query.is_sentence
        deviation = float(scales[:, 1].mean()) if is_sentence else 0.0
        moments, reranked = [], self.reranked.get(self._index.place(video.slot))
        for start, end, score, number in find_spans(windows, scores, most, deviation):
            window = windows[number]
            if is_sentence and not moments and len(windows) > 1 and (start, end) == window[:2]:
                # Of the best moment alone: it takes as much as refining a candidate.
                bank = self._ranker.bank(tuple(self._index.header["bank"]))
                start, end, _ = tighten(model, self._query.parts, bank, _film_of(video), window)
            scale = scales[number] if is_sentence else self._scale
            how_unusual = None if scale is None else unusual(score, scale)
            # The reranker read the best moment.
            was_read = reranked is not None and not moments
            explained = functools.partial(self._explained, video, window, number, was_read)
            moments.append(Moment(start, end, score, window, number, how_unusual, explained))
        path = file_of(self._index.folder, video.path)
        return Hit(rank, path, video, tuple(moments), tuple(windows), scores, reranked=reranked)

    def _explained(
        self, video: IndexedVideo, window: Window, number: int, was_read: bool
    ) -> Explanation | None:
        model = self._ranker.model
        if window.frames == video.windows[number].frames:
            arrays = {name: array[number] for name, array in stored_windows(video).items()}
        else:
            encoded = encode(model, [(_film_of(video), window)])
            arrays = {name: array[0] for name, array in encoded.items()}
        times = [video.times[frame] for frame in window.frames]
        part = self._query.parts[0]
        found = explain(model.interaction, part, arrays, self._query.words, times)
        if found is None or not was_read:
            return found
        attention, added = model.reranker.explain(part.text, arrays)
        # Without padding.
        shown = {"attention": attention[: len(found.tokens)], "added": added[: len(times)]}
        return dataclasses.replace(found, **shown)


def _film_of(video: IndexedVideo) -> Film:
    arrays = video.record.arrays
    return Film(arrays["frame.time"], video.windows, arrays["feature.image_feat"])
