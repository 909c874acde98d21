"""An open index that follows its updates and answers queries."""

import collections
import contextlib
import dataclasses
import functools
import os
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from drl_jax.pretrained.model import RetrievalModel, check_model, load_source
from drl_jax.runtime.errors import Notice, UserError, as_path, check_count
from drl_jax.search import MOMENTS
from drl_jax.search.duplicates import same_picture
from drl_jax.search.filters import Filters
from drl_jax.search.hits import Hit, Hits
from drl_jax.search.index_file import (
    has_index,
    index_version,
    part_directories,
    read_header,
    recorded_encoder,
)
from drl_jax.search.open_index import EmptyIndexError, IndexedVideo, OpenIndex, Place, Videos
from drl_jax.search.query import (
    EncodedQuery,
    Query,
    encode_query,
    encode_sentences,
    encode_video_file,
    read_picture,
)
from drl_jax.search.ranking import Answer, FindCandidates, Ranker, SearchOptions

if TYPE_CHECKING:
    from drl_jax.search.update import IndexReport

# Seconds that queries wait for a new state of their index; one that is opened for longer is used by
# later queries.
_PATIENCE = 0.1
# Sentences that are compared together at most.
_TOGETHER = 32
# Encoded queries, and their best windows, that are kept: a page asks for a query several times.
_KEPT = 64
# Videos that are ranked by both picture and text, and what is added to their ranks: the usual
# constant of reciprocal rank fusion.
_FUSED, _RANK_OFFSET = 200, 60


@dataclasses.dataclass(eq=False)
class _Request:
    state: OpenIndex
    query: EncodedQuery
    top: int
    among: Videos | None
    rerank: int
    answer: Answer | None = None

    def joins(self, other: "_Request") -> bool:
        are_sentences = self.query.is_sentence and other.query.is_sentence
        alike = ((one.top, one.rerank) for one in (self, other))
        are_alike = self.state is other.state and len({*alike}) == 1
        return are_sentences and are_alike and self.among is other.among is None


class Index:
    """An index of the videos of folders, and its model. Safe to use from several threads.

    Every query is answered from the current state of the index, or from the one before while the
    current one takes long to open.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        model: RetrievalModel | None = None,
        options: SearchOptions | None = None,
        ask_engine: FindCandidates | None = None,
    ):
        """Opens an index, or with a model makes one, which is empty until `add`.

        Args:
          directory: of the index.
          model: the one it was made with. None: it is loaded from where it was.
          options: how queries are answered.
          ask_engine: finds candidates elsewhere.

        Raises:
          UserError: there is no index and no model, or it is damaged, or of another model.
        """
        self.directory = as_path(directory, "the index").absolute()
        options = options or SearchOptions()
        if not isinstance(options, SearchOptions):
            raise UserError(f"the options of an Index are SearchOptions(...), not {options!r}")
        if model is not None:
            check_model(model, "Index")
        self._adding = threading.Lock()
        is_new = model is not None and not has_index(self.directory)
        if model is None:
            model = load_source(read_header(part_directories(self.directory)[0])["source"])
        self.model, self.ranker = model, Ranker(model, options, ask_engine)
        self._refreshing, self._encoding, self._searching = (threading.Lock() for _ in range(3))
        self._waiting: list[_Request] = []
        self._failure: Exception | None = None
        self._opening, self._ready_by = threading.Thread(), 0.0
        self._state: OpenIndex | None = None
        if not is_new:
            with contextlib.suppress(EmptyIndexError):
                self._state = OpenIndex(self.directory, self.model)
        if self._state is not None and options.correction is not None:
            self._state.biases(options.correction)
        if self._state is not None:
            self.ranker.reranked(self._state, options.rerank)
        if self._state is not None and options.engine == "auto" and self.ranker.scans(self._state):
            windows, count = len(self._state.gallery), options.candidates
            text = f"{windows:,} windows are scanned, and the best {count:,} are compared exactly"
            warnings.warn(f"{text}; engine=exact compares all", Notice, stacklevel=2)
        self._encoded = functools.lru_cache(maxsize=_KEPT)(self._encode)
        self._found = functools.lru_cache(maxsize=_KEPT)(self._find)

    def add(
        self,
        videos: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        progress: bool = False,
        prune: bool = False,
    ) -> "IndexReport":
        """Adds the videos of a folder, or updates the index to them; or only some files.

        Args:
          videos: a folder, which is searched recursively; or files of the folders of the index, to
            add, update or remove. Their paths may be relative to its folder.
          progress: whether to print a bar.
          prune: remove files that are gone also if they are most of a folder.

        Returns:
          The numbers of files that were added, changed, moved and removed, and of those that cannot
          be read why.

        Raises:
          UserError: there is no such folder, or no video in it, a file is in no folder of the
            index, or it was made with something else.
        """
        from drl_jax.search.update import add_videos

        how = {"shows_progress": progress, "prune": prune}
        with self._adding:
            return add_videos(self._updating, self.directory, videos, **how)

    @functools.cached_property
    def _updating(self) -> RetrievalModel:
        """The model with the encoder of the index, which is compiled once."""
        return self.model.with_encoder("auto", recorded_encoder(self.directory))

    def __repr__(self) -> str:
        try:
            state = self.state()
        except UserError as error:
            about = f": {error}" if has_index(self.directory) else " of 0 videos"
            return f"Index {self.directory}{about}"
        return f"Index of {state.count} videos of {state.folder} in {self.directory}"

    def state(self) -> OpenIndex:
        """A state of the index to answer from; raises as `__init__` does."""
        with self._refreshing:
            if self._state is None:
                self._state = OpenIndex(self.directory, self.model)
            version = index_version(self.directory)
            if version == self._state.version and all(version.values()):
                self._failure = None
                return self._state
            if not self._opening.is_alive():
                self._ready_by = time.monotonic() + _PATIENCE
                self._opening = threading.Thread(target=self._reopen, daemon=True)
                self._opening.start()
            # All queries together wait so long, not each of them.
            self._opening.join(max(0.0, self._ready_by - time.monotonic()))
            if self._failure is not None:
                raise self._failure
            return self._state

    def _reopen(self) -> None:
        try:
            state = OpenIndex(self.directory, self.model, self._state)
        except Exception as error:
            self._failure = error
            return
        self._state.close()
        self._state, self._failure = state, None
        self._found.cache_clear()  # It holds the state before, whose files may be deleted.

    def __reduce__(self) -> tuple:
        """Pickles where the index is; it is opened again."""
        return Index, (self.directory, self.model, self.ranker.options)

    @property
    def videos(self) -> Videos:
        return self.state().videos

    def search(
        self,
        query: str | Query | Sequence[str],
        top: int = 5,
        *,
        filters: Filters | None = None,
        moments: int = MOMENTS,
        text: bool = False,
        rerank: int | None = None,
    ) -> Hits | list[Hits]:
        """The `top` best videos for a query, or for each of several sentences.

        With `text`, the words of sentences are also looked for in transcripts, and the ranks of
        both are fused; hits have `cues`, and `moments` is the number of these at most, too. A
        Notice says why there is no text, or no reranking. With `rerank`, the reranker of the model
        (docs/rerank.md) orders so many of the first videos of sentences anew, instead of
        `SearchOptions.rerank`.

        Raises UserError if a query is empty or cannot be read, or no video passes the filters.
        """
        check_count(top, "top")
        check_count(moments, "moments")
        if not isinstance(filters, Filters | None):
            raise UserError(f"filters are Filters(...), not {type(filters).__name__}")
        if not isinstance(query, str | Query | list | tuple) or not all(
            isinstance(part, str) for part in (query if isinstance(query, list | tuple) else ())
        ):
            raise UserError("a query is a sentence, a list of sentences, or a Query")
        state = self.state()
        among = state.filtered(filters) if filters else None
        if among is not None and not len(among):
            raise UserError(f"none of the {state.count} videos passes the filters")
        if isinstance(query, str):
            query = Query(query)
        if isinstance(query, Query):
            options = {"moments": moments, "text": text, "rerank": rerank}
            hits = self.answer(state, query, top, among, **options)
            if hits.notice:
                warnings.warn(hits.notice, Notice, stacklevel=2)
            return hits
        if text:
            options = {"filters": filters, "moments": moments, "text": True, "rerank": rerank}
            return [self.search(sentence, top, **options) for sentence in query]
        query = list(query)
        encoded = encode_sentences(self.model, query)
        with self._searching:
            count = self.ranker.reranked(state, rerank)
            answers = self.ranker.rank(state, encoded, top, among, count)
            found = [answer.hits(answer.videos(top), moments) for answer in answers]
        parts = zip(found, query, answers, strict=True)
        return [Hits(hits, text, "", answer.rerank_ms) for hits, text, answer in parts]

    def answer(
        self,
        state: OpenIndex,
        query: Query,
        top: int,
        among: Videos | None = None,
        *,
        offset: int = 0,
        moments: int = MOMENTS,
        text: bool = False,
        rerank: int | None = None,
    ) -> Hits:
        """The hits of one query in one state of the index, those before `offset` left out."""
        if isinstance(query.video, Path):  # What is kept of a query has no file that can change.
            query = dataclasses.replace(query, video=encode_video_file(self.model, query.video))
        if isinstance(query.picture, Path):
            query = dataclasses.replace(query, picture=read_picture(self.model, query.picture))
        cues, notice = state.find_cues(query.sentence, _FUSED, moments, among) if text else ({}, "")
        count = self.ranker.reranked(state, rerank)
        encoded, most = self._encoded(query), max(top, _FUSED) if cues else top
        if count and not encoded.is_sentence:
            notice = "; ".join(filter(None, (notice, "only sentences are reranked")))
        request = _Request(state, encoded, most, among, count)
        self._waiting.append(request)
        with self._searching:
            if request.answer is None:
                self._rank(request)
            same = self._same(state, query, among)
            places = fuse(request.answer.places(), [*cues])[:top]
            found = [*same, *(state.video(*place) for place in places)]
            videos = list(dict.fromkeys(found))[offset:top]
            hits = request.answer.hits(videos, moments)
        shown = Hits((), query.sentence, notice, request.answer.rerank_ms)
        for rank, hit in enumerate(hits, start=offset + 1):
            said = tuple(cues.get(state.place(hit.video.slot), ()))
            shown.append(dataclasses.replace(hit, rank=rank, is_same=hit.video in same, cues=said))
        return shown

    def _encode(self, query: Query) -> EncodedQuery:
        with self._encoding:
            return encode_query(self.model, query)

    def _rank(self, request: _Request) -> None:
        """Ranks a query; sentences that wait at the same time share one product."""
        others = [one for one in self._waiting if one is not request and one.joins(request)]
        batch = [request, *others[: _TOGETHER - 1]]
        self._waiting = [one for one in self._waiting if one not in batch]
        queries = [one.query for one in batch]
        how = (request.top, request.among, request.rerank)
        answers = self.ranker.rank(request.state, queries, *how)
        for one, answer in zip(batch, answers, strict=True):
            one.answer = answer

    def _same(self, state: OpenIndex, query: Query, among: Videos | None) -> Sequence[IndexedVideo]:
        """The videos of which the picture of a query is a frame; they are first."""
        if not query.picture:
            return ()
        frame = np.frombuffer(query.picture, np.uint8).reshape(self.model.frame_form.shape)
        found = same_picture(state, frame)
        return found if among is None else [v for v in found if among.valid[v.slot]]

    def in_video(
        self,
        state: OpenIndex,
        query: Query,
        video: IndexedVideo,
        most: int,
        rerank: int | None = None,
    ) -> Hit:
        """The hit of a query in one video, as a search that finds it has it."""
        count = self.ranker.reranked(state, rerank)
        with self._searching:
            answer = self._found(state, query, None, count)
            if answer.refined.keys().isdisjoint(video.slots.tolist()):
                is_reranked = state.place(video.slot) in answer.reranked
                answer = self._found(state, query, video.path, int(is_reranked))
            return answer.hits([video], most)[0]

    def _find(self, state: OpenIndex, query: Query, path: str | None, rerank: int) -> Answer:
        among = None if path is None else state.filtered(Filters(only=(path,)))
        return self.ranker.rank(state, [self._encoded(query)], 1, among, rerank)[0]


def fuse(pictures: Sequence[Place], texts: Sequence[Place]) -> list[Place]:
    """Fuses two rankings by the sums of reciprocal ranks; later pictures follow.

    Of equal sums, as of the first ones of both, that of the picture comes first. Without texts, the
    pictures keep their order.
    """
    sums: collections.Counter[Place] = collections.Counter()
    for ranking in (pictures[:_FUSED], texts):
        sums.update({place: 1 / (_RANK_OFFSET + rank) for rank, place in enumerate(ranking, 1)})
    return list(dict.fromkeys([*dict(sums.most_common()), *pictures]))
