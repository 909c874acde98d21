"""Answers of the JSON API, which the page shows; `page/openapi.json` describes them."""

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from drl_jax.models.tokenizers.base import END, START
from drl_jax.search import MOMENTS
from drl_jax.search.addresses import (
    MAX_MOMENTS,
    BadRequest,
    PageQuery,
    file_address,
    parse_time,
)
from drl_jax.search.candidates import CandidateSearch
from drl_jax.search.hit_json import explanation_json, hit_json
from drl_jax.search.hits import Hit, Moment
from drl_jax.search.moments import find_spans
from drl_jax.search.query import EncodedQuery, Query
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.sent import SentQueries
from drl_jax.search.session import SearchSession
from drl_jax.search.snapshot import IndexSnapshot

# Folders that are suggested at most.
_FOLDERS = 200


class SearchAPI:
    """Answers requests as values of JSON; safe to use from several threads.

    Attributes:
      session: the index and its model.
      top: number of hits, unless the request has another.
      sent: pictures and videos that were sent as queries.
    """

    def __init__(self, session: SearchSession, top: int, candidates: CandidateSearch | None = None):
        """Opens nothing.

        Args:
          session: the index and its model.
          top: number of hits, unless the request has another.
          candidates: answers sentences among all videos; None: all videos are compared.
        """
        self.session, self.top, self._candidates = session, top, candidates
        self._searching = threading.Lock()  # A query uses all cores.
        self._facts: tuple[IndexSnapshot | None, dict[str, Any]] = (None, {})
        # The page of an open hit asks for the same query again.
        self._encoded = functools.lru_cache(maxsize=64)(self._encode)
        self.sent = SentQueries(session.model)

    def index(self) -> dict[str, Any]:
        """Facts of the index, and the progress of the process that updates it."""
        index = self.session.snapshot()
        # Counted once for each state of the index: every page shows them.
        known, facts = self._facts
        if known is not index:
            listing = index.listing
            folders = {path.rpartition("/")[0] for path in listing.paths} - {""}
            facts = {
                "folder": str(index.folder),
                "videos": len(index.videos),
                "windows": index.videos.windows,
                "hours": round(float(listing.lengths.sum()) / 3600, 3),
                "folders": sorted(folders)[:_FOLDERS],
                "unsearchable": index.unsearchable_count,
            }
            self._facts = (index, facts)
        progress = index.progress()
        return {**facts, "indexing": progress and progress._asdict()}

    def unsearchable(self) -> dict[str, Any]:
        """The files of the folder that cannot be searched, and why."""
        files = self.session.snapshot().unsearchable()
        return {"files": [{"path": video.path, "reason": video.error} for video in files]}

    def search(self, query: PageQuery) -> dict[str, Any]:
        """The hits of a query, or the videos of the index where it has no sentence.

        Raises:
          UserError: the sentence is blank, there are fewer hits than its offset, or no video has
            one of the paths.
        """
        index, top = self.session.snapshot(), query.top or self.top
        # The addresses of hits do not depend on the video that is open.
        query = dataclasses.replace(query, video=None, time=None, moments=None)
        filters = query.filters
        if filters.only:
            paths = tuple(video_of(index, path).path for path in filters.only)
            filters = dataclasses.replace(filters, only=paths)
        among = index.filtered(filters) if filters else None
        total = len(index.videos if among is None else among)
        if query.offset and query.offset >= total:
            raise BadRequest(f"offset must be below the number of videos, {total}")
        end = min(query.offset + top, total)
        used = None
        if not query.asks:
            page = (index.videos if among is None else among)[query.offset : end]
            hits = [_listed(index, video) for video in page]
        else:
            with self._searching:
                encoded, used = self._encoded_of(index, query)
                hits = self._hits(index, query, encoded, among, end) if total else []
        return {
            "query": query.sentence,
            "offset": query.offset,
            "total": total,
            "next": query.address(offset=end) if end < total else None,
            "tokens_used": used,
            "hits": [hit_json(index, query, hit) for hit in hits],
        }

    def video(self, query: PageQuery) -> dict[str, Any]:
        """One video: its moments, the heat of its timeline, and the explanation of one moment.

        Raises:
          UserError: it is not in the index, or the time is not in it.
        """
        index = self.session.snapshot()
        video = video_of(index, query.video)
        length = video.length
        if query.time is not None and query.time > length + 0.001:
            raise BadRequest(f"t={query.time:g} is outside the video, which has {length:.1f} s")
        most = query.moments or MOMENTS
        if not query.asks:
            hit, has_more = _listed(index, video), False
        else:
            with self._searching:
                encoded, _ = self._encoded_of(index, query)
                (hit,) = index.hits(encoded, [video], most)
            has_more = most < MAX_MOMENTS and (
                len(find_spans(video.windows, hit.scores, most + 1)) > most
            )
        number = _open_moment(hit.moments, query.time)
        moment = hit.moments[number] if hit.moments else None
        windows = video.windows if query.asks else ()
        return {
            **hit_json(index, query, hit),
            "time": query.time if query.time is not None else moment.start if moment else 0.0,
            "windows": len(video.windows),
            "frames": [round(time, 3) for time in video.times],
            "frame_prefix": file_address("frames", video.path, v=video.sha256[:8]) + "&frame=",
            "heat": [
                {"start": window.start, "end": window.end, "score": round(float(score), 6)}
                for window, score in zip(windows, hit.scores, strict=True)
            ],
            "moment": number if moment else None,
            "more": query.address(offset=0, moments=MAX_MOMENTS) if has_more else None,
            "explanation": explanation_json(video, moment) if moment else None,
        }

    def _hits(
        self,
        index: IndexSnapshot,
        query: PageQuery,
        encoded: EncodedQuery,
        among: Sequence[IndexedVideo] | None,
        end: int,
    ) -> list[Hit]:
        found: list[IndexedVideo] = []
        if self._candidates is not None and encoded.is_sentence and among is None:
            found = self._candidates.best_videos(index, encoded.parts, end)
        # Pages that lie behind the candidates are found by comparing all videos.
        if len(found) < end:
            found = index.best_of(encoded, end, among)
        hits = index.hits(encoded, found[query.offset : end])
        return [dataclasses.replace(hit, rank=hit.rank + query.offset) for hit in hits]

    def _encoded_of(
        self, index: IndexSnapshot, query: PageQuery
    ) -> tuple[EncodedQuery, int | None]:
        """The encoded query, and how many tokens of its sentence are used if not all are."""
        like = None
        if query.like is not None:
            path, _, seconds = query.like.rpartition("@")
            if not path:
                raise BadRequest(f"like takes PATH@SECONDS, not {query.like[:100]!r}")
            video, time = video_of(index, path), parse_time("like", seconds)
            if time > video.length:
                raise BadRequest(f"like: {path} has the seconds 0 to {video.length:.1f}")
            like = (video, time)
        return self._encoded(
            query.sentence or "", query.without or "", query.picture, query.by_video, like
        )

    def _encode(
        self,
        sentence: str,
        without: str,
        picture: str | None,
        by_video: str | None,
        like: tuple[IndexedVideo, float] | None,
    ) -> tuple[EncodedQuery, int | None]:
        content = self.sent.picture(picture) if picture else b""
        video = self.sent.video(by_video) if by_video else None
        index, model = self.session.snapshot(), self.session.model
        encoded = index.encoded(Query(sentence, without, content, video, like))
        if not (sentence.strip() and model.tokenize([sentence]).is_cut[0]):
            return encoded, None
        (words,) = model.token_strings([sentence])
        return encoded, sum(word not in (START, END) for word in words)


def video_of(index: IndexSnapshot, path: str | None) -> IndexedVideo:
    """The video of an index with a path; forms of browsers send a newline in it as CR LF.

    Raises:
      BadRequest: there is none.
    """
    if path is None:
        raise BadRequest("name the video with video=PATH")
    video = index.video_at(path) or index.video_at(path.replace("\r\n", "\n"))
    if video is None:
        raise BadRequest(f"no video of the index has the path {path[:200]!r}", 404)
    return video


def _listed(index: IndexSnapshot, video: IndexedVideo) -> Hit:
    """A video that was not searched for; it has no moments."""
    return Hit(0, index.folder / video.path, video, (), np.zeros(0, np.float32))


def _open_moment(moments: Sequence[Moment], time: float | None) -> int:
    """The moment with a time, the nearest one if none has it; the best without a time."""
    if time is None or not moments:
        return 0
    return min(
        range(len(moments)), key=lambda n: max(moments[n].start - time, time - moments[n].end, 0)
    )
