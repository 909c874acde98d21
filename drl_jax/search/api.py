"""Answers of the JSON API, which the page shows; `page/openapi.json` describes them."""

import collections
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from drl_jax.models.tokenizers.base import END, START
from drl_jax.search.addresses import BadRequest, PageQuery, file_address, parse_time
from drl_jax.search.clips import MAX_CLIP
from drl_jax.search.explain import Explanation
from drl_jax.search.hits import Hit, Moment
from drl_jax.search.query import EncodedQuery, Query, read_picture
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.session import SearchSession
from drl_jax.search.snapshot import IndexSnapshot
from drl_jax.search.word_table import word_rows

# Folders that are suggested at most.
_FOLDERS = 200
# Pictures that are kept for queries.
_MAX_PICTURES = 32


class SearchAPI:
    """Answers requests as values of JSON; safe to use from several threads.

    Attributes:
      session: the index and its model.
      top: number of hits, unless the request has another.
    """

    def __init__(self, session: SearchSession, top: int):
        self.session, self.top = session, top
        self._searching = threading.Lock()  # A query uses all cores.
        self._facts: tuple[IndexSnapshot | None, dict[str, Any]] = (None, {})
        # The page of an open hit asks for the same query again.
        self._encoded = functools.lru_cache(maxsize=64)(self._encode)
        self._pictures = SentPictures()

    def index(self) -> dict[str, Any]:
        """Facts of the index."""
        index = self.session.snapshot()
        # Counted once for each state of the index: every page shows them.
        known, facts = self._facts
        if known is not index:
            listing = list(index.videos.listing())
            folders = {video.path.rpartition("/")[0] for video in listing} - {""}
            facts = {
                "folder": str(index.folder),
                "videos": len(index.videos),
                "windows": index.videos.windows,
                "hours": round(sum(video.length for video in listing) / 3600, 3),
                "folders": sorted(folders)[:_FOLDERS],
            }
            self._facts = (index, facts)
        return facts

    def search(self, query: PageQuery) -> dict[str, Any]:
        """The hits of a query, or the videos of the index where it has no sentence.

        Raises:
          UserError: the sentence is blank, or there are fewer hits than its offset.
        """
        index, top = self.session.snapshot(), query.top or self.top
        among = index.filtered(query.filters) if query.filters else None
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
            "next": query.address(offset=end, video=None, time=None) if end < total else None,
            "tokens_used": used,
            "hits": [_hit_json(index, query, hit) for hit in hits],
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
        if not query.asks:
            hit = _listed(index, video)
        else:
            with self._searching:
                encoded, _ = self._encoded_of(index, query)
                (hit,) = index.hits(encoded, [video])
        number = _open_moment(hit.moments, query.time)
        moment = hit.moments[number] if hit.moments else None
        windows = video.windows if query.asks else ()
        return {
            **_hit_json(index, query, hit),
            "time": query.time if query.time is not None else moment.start if moment else 0.0,
            "frames": [round(time, 3) for time in video.times],
            "frame_prefix": file_address("frames", video.path, v=video.sha256[:8]) + "&frame=",
            "heat": [
                {"start": window.start, "end": window.end, "score": round(float(score), 6)}
                for window, score in zip(windows, hit.scores, strict=True)
            ],
            "moment": number if moment else None,
            "explanation": _explanation_json(video, moment) if moment else None,
        }

    def _hits(
        self,
        index: IndexSnapshot,
        query: PageQuery,
        encoded: EncodedQuery,
        among: Sequence[IndexedVideo] | None,
        end: int,
    ) -> list[Hit]:
        page = index.best_of(encoded, end, among)[query.offset : end]
        hits = index.hits(encoded, page)
        return [dataclasses.replace(hit, rank=hit.rank + query.offset) for hit in hits]

    def add_picture(self, content: bytes) -> str:
        """Keeps a picture for queries; returns its name.

        Raises:
          UserError: it is no image.
        """
        read_picture(self.session.model, content)
        return self._pictures.add(content)

    def _encoded_of(
        self, index: IndexSnapshot, query: PageQuery
    ) -> tuple[EncodedQuery, int | None]:
        """The encoded query, and how many tokens of its sentence are used if not all are."""
        like = None
        if query.like is not None:
            path, _, seconds = query.like.rpartition("@")
            video, time = video_of(index, path or None), parse_time("like", seconds)
            if time > video.length:
                raise BadRequest(f"like: {path} has the seconds 0 to {video.length:.1f}")
            like = (video, time)
        return self._encoded(query.sentence or "", query.without or "", query.picture, like)

    def _encode(
        self,
        sentence: str,
        without: str,
        picture: str | None,
        like: tuple[IndexedVideo, float] | None,
    ) -> tuple[EncodedQuery, int | None]:
        content = self._pictures.content(picture) if picture else b""
        index, model = self.session.snapshot(), self.session.model
        encoded = index.encoded(Query(sentence, without, content, like=like))
        (tokens,) = model.token_strings([sentence]) if sentence.strip() else ([],)
        if len(tokens) < model.config.data.max_words:
            return encoded, None
        return encoded, sum(token not in (START, END) for token in tokens)


class SentPictures:
    """Pictures that browsers sent, the last ones in memory."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._lock = threading.Lock()

    def add(self, content: bytes) -> str:
        """Keeps a picture; returns its name."""
        name = hashlib.sha256(content).hexdigest()[:16]
        with self._lock:
            self._kept[name] = content
            self._kept.move_to_end(name)
            while len(self._kept) > _MAX_PICTURES:
                self._kept.popitem(last=False)
        return name

    def content(self, name: str) -> bytes:
        """The bytes of a picture.

        Raises:
          BadRequest: it is not kept (any more).
        """
        with self._lock:
            if name not in self._kept:
                raise BadRequest("the picture is not known any more; send it again", 404)
            return self._kept[name]


def video_of(index: IndexSnapshot, path: str | None) -> IndexedVideo:
    """The video of an index with a path.

    Raises:
      BadRequest: there is none.
    """
    if path is None:
        raise BadRequest("name the video with video=PATH")
    video = index.video_at(path)
    if video is None:
        raise BadRequest(f"no video of the index has the path {path[:200]!r}", 404)
    return video


def state_of(index: IndexSnapshot, video: IndexedVideo) -> str:
    """Whether a file is as it was indexed: ok, changed or missing."""
    if index.is_unchanged(video):
        return "ok"
    return "changed" if Path(index.folder / video.path).exists() else "missing"


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


def _hit_json(index: IndexSnapshot, query: PageQuery, hit: Hit) -> dict[str, Any]:
    video = hit.video
    start = hit.moments[0].start if hit.moments else None
    return {
        "rank": hit.rank or None,
        "score": round(hit.score, 6) if hit.moments else None,
        "weak": bool(hit.moments) and hit.is_weak,
        "path": video.path,
        "name": PurePosixPath(video.path).name,
        "duration": round(video.length, 3),
        "state": state_of(index, video),
        "page": query.address(video=video.path, time=start, offset=0),
        "media": file_address("videos", video.path),
        **_pictures(video, hit.moments[0].peak if hit.moments else video.length / 2),
        "moments": [_moment_json(query, video, moment) for moment in hit.moments],
    }


def _moment_json(query: PageQuery, video: IndexedVideo, moment: Moment) -> dict[str, Any]:
    start, end = round(moment.start, 3), round(moment.end, 3)
    # Of a long moment, the part around its peak.
    first = max(start, min(moment.peak - MAX_CLIP / 2, end - MAX_CLIP))
    clip = {"start": f"{first:.3f}", "end": f"{min(first + MAX_CLIP, end):.3f}"}
    return {
        "start": start,
        "end": end,
        "peak": round(moment.peak, 3),
        "score": round(moment.score, 6),
        "unusual": None if moment.unusual is None else round(moment.unusual, 2),
        "like": query.address(
            sentence=None,
            without=None,
            picture=None,
            like=f"{video.path}@{moment.peak:.3f}",
            video=None,
            time=None,
            offset=0,
        ),
        "window": moment.window,
        "page": query.address(video=video.path, time=moment.start, offset=0),
        "clip": file_address("clips", video.path, **clip),
        "strip": _frames(video, window=moment.window),
        "strip_frames": len(video.windows[moment.window].frames),
        **_pictures(video, moment.peak),
    }


def _pictures(video: IndexedVideo, time: float) -> dict[str, str]:
    """The picture at a time: from the file, and small from the index."""
    frame = int(np.abs(np.asarray(video.times) - time).argmin())
    version = {"v": video.sha256[:8]}
    seconds = f"{video.times[frame]:.3f}"
    return {
        "picture": file_address("pictures", video.path, t=seconds, **version),
        "thumbnail": _frames(video, frame=frame),
    }


def _frames(video: IndexedVideo, **which: int) -> str:
    return file_address("frames", video.path, **which, v=video.sha256[:8])


def _explanation_json(video: IndexedVideo, moment: Moment) -> dict[str, Any]:
    explanation = moment.explanation
    assert isinstance(explanation, Explanation)  # The query is a sentence.
    rows, marks = word_rows(explanation)
    frames = video.windows[moment.window].frames
    return {
        "marks_share": round(marks, 4),
        "times": [round(float(time), 3) for time in explanation.times],
        "thumbnails": [_frames(video, frame=frame) for frame in frames],
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
