"""Answers of the JSON API, which the page shows; `page/openapi.json` describes them."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import PurePosixPath
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
from drl_jax.search.clips import MAX_CLIP
from drl_jax.search.hits import Explanation, Hit, Moment, word_rows
from drl_jax.search.media import SentQueries
from drl_jax.search.open_index import IndexedVideo, OpenIndex
from drl_jax.search.query import Query
from drl_jax.search.session import Index
from drl_jax.search.windows import find_spans

# Folders that are suggested at most.
_FOLDERS = 200


class SearchAPI:
    """Answers requests as values of JSON; safe to use from several threads.

    Attributes:
      index: open.
      top: number of hits, unless the request has another.
      sent: pictures and videos that were sent as queries.
    """

    def __init__(self, index: Index, top: int):
        self.index, self.top = index, top
        # Counted once for each state of the index: every page shows them.
        self._facts = functools.lru_cache(maxsize=1)(_facts_of)
        self.sent = SentQueries(index.model)

    def facts(self) -> dict[str, Any]:
        """Facts of the index, and the progress of the process that updates it."""
        state = self.index.state()
        progress = state.progress()
        return {**self._facts(state), "indexing": progress and progress._asdict()}

    def unsearchable(self) -> dict[str, Any]:
        """The files of the folder that cannot be searched, and why."""
        files = self.index.state().unsearchable()
        return {"files": [{"path": path, "reason": reason} for path, reason in files]}

    def search(self, query: PageQuery) -> dict[str, Any]:
        """The hits of a query, or the videos of the index where it has no sentence.

        Raises:
          UserError: the sentence is blank, there are fewer hits than its offset, or no video has
            one of the paths.
        """
        state, top = self.index.state(), query.top or self.top
        # The addresses of hits do not depend on the video that is open.
        query = dataclasses.replace(query, video=None, time=None, moments=None)
        filters = query.filters
        if filters.only:
            paths = tuple(video_of(state, path).path for path in filters.only)
            filters = dataclasses.replace(filters, only=paths)
        among = state.filtered(filters) if filters else None
        total = state.count if among is None else len(among)
        if query.offset and query.offset >= total:
            raise BadRequest(f"offset must be below the number of videos, {total}")
        end = min(query.offset + top, total)
        hits: list[Hit] = []
        if not query.asks:
            videos = state.videos if among is None else among
            hits = [_listed(state, video) for video in videos[query.offset : end]]
        elif total:
            asked = self._asked(state, query)
            hits = self.index.answer(state, asked, end, among, offset=query.offset)
        return {
            "query": query.sentence,
            "offset": query.offset,
            "total": total,
            "next": query.address(offset=end) if end < total else None,
            "tokens_used": self._tokens_used(query.sentence or ""),
            "hits": [hit_json(state, query, hit) for hit in hits],
        }

    def video(self, query: PageQuery) -> dict[str, Any]:
        """One video: its moments, the heat of its timeline, and the explanation of one moment.

        Raises:
          UserError: it is not in the index, or the time is not in it.
        """
        state = self.index.state()
        video = video_of(state, query.video)
        if query.time is not None and query.time > video.duration + 0.001:
            raise BadRequest(
                f"t={query.time:g} is outside the video, which has {video.duration:.1f} s"
            )
        most, has_more = query.moments or MOMENTS, False
        hit = _listed(state, video)
        if query.asks:
            hit = self.index.in_video(state, self._asked(state, query), video, most)
            has_more = most < MAX_MOMENTS and (
                len(find_spans(hit.windows, hit.scores, most + 1)) > most
            )
        number = _open_moment(hit.moments, query.time)
        moment = hit.moments[number] if hit.moments else None
        return {
            **hit_json(state, query, hit),
            "time": query.time if query.time is not None else moment.start if moment else 0.0,
            "windows": len(video.windows),
            "frames": [round(time, 3) for time in video.times],
            "frame_prefix": _frames(video) + "&frame=",
            "heat": [
                {"start": window.start, "end": window.end, "score": round(float(score), 6)}
                for window, score in zip(hit.windows, hit.scores, strict=True)
            ],
            "moment": number if moment else None,
            "more": query.address(offset=0, moments=MAX_MOMENTS) if has_more else None,
            "explanation": _explanation_json(video, moment) if moment else None,
        }

    def _asked(self, state: OpenIndex, query: PageQuery) -> Query:
        """What a request looks for."""
        like = None
        if query.like is not None:
            path, _, seconds = query.like.rpartition("@")
            if not path:
                raise BadRequest(f"like takes PATH@SECONDS, not {query.like[:100]!r}")
            video, time = video_of(state, path), parse_time("like", seconds)
            if time > video.duration:
                raise BadRequest(f"like: {path} has the seconds 0 to {video.duration:.1f}")
            like = (video, time)
        return Query(
            query.sentence or "",
            query.without or "",
            self.sent.picture(query.picture) if query.picture else b"",
            self.sent.video(query.by_video) if query.by_video else None,
            like,
        )

    def _tokens_used(self, sentence: str) -> int | None:
        """How many tokens of a sentence are used if not all are."""
        model = self.index.model
        if not (sentence.strip() and model.tokenize([sentence]).is_cut[0]):
            return None
        (words,) = model.token_strings([sentence])
        return sum(word not in (START, END) for word in words)


def _facts_of(state: OpenIndex) -> dict[str, Any]:
    listing = state.videos.listing
    folders = {path.rpartition("/")[0] for path in listing["path"].to_pylist()} - {""}
    return {
        "folder": str(state.folder),
        "videos": state.count,
        "windows": len(state.gallery),
        "hours": round(float(listing["duration"].to_numpy().sum()) / 3600, 3),
        "folders": sorted(folders)[:_FOLDERS],
        "unsearchable": state.unsearchable_count,
    }


def video_of(state: OpenIndex, path: str | None) -> IndexedVideo:
    """The video of an index with a path; forms of browsers send a newline in it as CR LF.

    Raises:
      BadRequest: there is none.
    """
    if path is None:
        raise BadRequest("name the video with video=PATH")
    video = state.video_at(path) or state.video_at(path.replace("\r\n", "\n"))
    if video is None:
        raise BadRequest(f"no video of the index has the path {path[:200]!r}", 404)
    return video


def state_of(state: OpenIndex, video: IndexedVideo) -> str:
    """Whether a file is as it was indexed: ok, changed or missing."""
    if state.is_unchanged(video):
        return "ok"
    return "changed" if (state.folder / video.path).exists() else "missing"


def hit_json(state: OpenIndex, query: PageQuery, hit: Hit) -> dict[str, Any]:
    """A video, and its moments if it was searched for."""
    video = hit.video
    best = hit.moments[0] if hit.moments else None
    return {
        "rank": hit.rank or None,
        "score": round(hit.score, 6) if best else None,
        "weak": hit.is_weak,
        "same_picture": hit.is_same,
        "path": video.path,
        "name": PurePosixPath(video.path).name,
        "duration": round(video.duration, 3),
        "state": state_of(state, video),
        "page": query.address(video=video.path, time=best and best.start, offset=0),
        "media": file_address("videos", video.path),
        **_pictures(video, best.peak if best else video.duration / 2),
        "moments": [_moment_json(query, video, moment) for moment in hit.moments],
    }


def _moment_json(query: PageQuery, video: IndexedVideo, moment: Moment) -> dict[str, Any]:
    start, end = round(moment.start, 3), round(moment.end, 3)
    # Of a long moment, the part around its peak.
    first = max(start, min(moment.peak - MAX_CLIP / 2, end - MAX_CLIP))
    clip = {"start": f"{first:.3f}", "end": f"{min(first + MAX_CLIP, end):.3f}"}
    frames = moment.window.frames
    alone = query.closed(sentence=None, without=None, picture=None, by_video=None)
    return {
        "start": start,
        "end": end,
        "peak": round(moment.peak, 3),
        "score": round(moment.score, 6),
        "unusual": None if moment.unusual is None else round(moment.unusual, 2),
        "like": dataclasses.replace(alone, like=f"{video.path}@{moment.peak:.3f}").address(),
        "window": moment.number,
        "page": query.address(video=video.path, time=moment.start, offset=0),
        "clip": file_address("clips", video.path, **clip),
        "strip": _frames(video, frames=",".join(map(str, frames))),
        "strip_frames": len(frames),
        **_pictures(video, moment.peak),
    }


def _pictures(video: IndexedVideo, time: float) -> dict[str, str]:
    """The picture at a time: from the file, and small from the index."""
    frame = int(np.abs(np.asarray(video.times) - time).argmin())
    version = {"v": video.record.sha256[:8]}
    seconds = f"{video.times[frame]:.3f}"
    return {
        "picture": file_address("pictures", video.path, t=seconds, **version),
        "thumbnail": _frames(video, frame=frame),
    }


def _frames(video: IndexedVideo, **which: int | str) -> str:
    return file_address("frames", video.path, **which, v=video.record.sha256[:8])


def _explanation_json(video: IndexedVideo, moment: Moment) -> dict[str, Any]:
    """Why a moment was found."""
    explanation: Explanation = moment.explanation
    rows, marks = word_rows(explanation)
    return {
        "marks_share": round(marks, 4),
        "times": [round(float(time), 3) for time in explanation.times],
        "thumbnails": [_frames(video, frame=frame) for frame in moment.window.frames],
        "frame_weights": [round(float(w), 4) for w in explanation.attribution.frame_weight],
        "words": [
            {
                "word": row.word,
                "weight": round(row.weight, 4),
                "similarity": [round(float(value), 4) for value in row.similarity],
            }
            for row in rows
        ],
    }


def _listed(state: OpenIndex, video: IndexedVideo) -> Hit:
    """A video that was not searched for; it has no moments."""
    return Hit(0, state.folder / video.path, video)


def _open_moment(moments: Sequence[Moment], time: float | None) -> int:
    """The moment with a time, the nearest one if none has it; the best without a time."""
    if time is None or not moments:
        return 0
    return min(
        range(len(moments)), key=lambda n: max(moments[n].start - time, time - moments[n].end, 0)
    )
