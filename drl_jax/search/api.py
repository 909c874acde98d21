"""Answers of the JSON API, which the page shows; `page/openapi.json` describes them."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from drl_jax.models.tokenizers.base import END, START
from drl_jax.runtime.errors import printable
from drl_jax.search import MOMENTS
from drl_jax.search.addresses import (
    MAX_HITS,
    MAX_MOMENTS,
    BadRequest,
    PageQuery,
    file_address,
    moment_of,
    span_of,
    video_of,
)
from drl_jax.search.clips import MAX_CLIP
from drl_jax.search.duplicates import same_moments
from drl_jax.search.exports import FORMATS, Cut, cut_list
from drl_jax.search.hits import Hit, Hits, Moment, rounded
from drl_jax.search.media import Media
from drl_jax.search.open_index import IndexedVideo, OpenIndex
from drl_jax.search.query import Query
from drl_jax.search.reading import file_of
from drl_jax.search.session import Index
from drl_jax.search.suggestions import Suggestions
from drl_jax.search.windows import find_spans

# Folders that are suggested at most.
_FOLDERS = 200
# States of files that cannot be shown: why, and the status of answers.
STATES = {
    "changed": ("the file has changed since it was indexed; index the folder again", 409),
    "missing": ("the file is missing: it was moved, deleted, or its disk is not mounted", 410),
}


class SearchAPI:
    """Answers requests as values of JSON, or raises UserError; safe to use from several threads."""

    def __init__(self, index: Index, top: int, max_video: int):
        self.index, self.top, self.media = index, top, Media(index.model, max_video)
        self._suggestions, self._model = Suggestions(index.model), {"model": index.model.about}

    def close(self) -> None:
        self._suggestions.close()
        self.media.close()

    def facts(self) -> dict[str, Any]:
        state = self.index.state()
        suggestions = self._suggestions.of(state)
        varying = {
            "transcripts": state.transcripts(),
            "indexing": state.progress(),
            "suggestions": suggestions,
        }
        return {**_facts_of(state), **self._model, **varying}

    def unsearchable(self) -> dict[str, Any]:
        files = self.index.state().unsearchable()
        found = [{"path": path, "reason": reason} for path, reason in files]
        return {**self._model, "files": found}

    def search(self, query: PageQuery) -> dict[str, Any]:
        """The hits of a query, or the videos of the index where it looks for nothing."""
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
        if not query.asks or not total:
            listed = (state.videos if among is None else among)[query.offset : end]
            hits = Hits([Hit(0, state.folder / video.path, video) for video in listed])
        else:
            asked = self._asked(state, query)
            options = {"offset": query.offset, "text": bool(query.text), "rerank": query.rerank}
            hits = self.index.answer(state, asked, end, among, **options)
        same = _same_as(state, hits)
        return {
            **self._model,
            "query": query.sentence,
            "offset": query.offset,
            "total": total,
            "next": query.address(offset=end) if end < total else None,
            "tokens_used": self._tokens_used(query.sentence or ""),
            "notice": hits.notice or None,
            "rerank_ms": hits.rerank_ms and round(hits.rerank_ms, 1),
            "hits": [
                {**_hit_json(state, query, hit), "same_as": path}
                for hit, path in zip(hits, same, strict=True)
            ],
        }

    def video(self, query: PageQuery) -> dict[str, Any]:
        """One video: its moments, the heat of its timeline, and the explanation of one moment."""
        state, time = self.index.state(), query.time
        video = video_of(state, query.video)
        if time is not None and time > video.duration + 0.001:
            raise outside(time, video)
        most, more = query.moments or MOMENTS, None
        hit = Hit(0, state.folder / video.path, video)
        if query.asks:
            asked = self._asked(state, query)
            hit = self.index.in_video(state, asked, video, most, query.rerank)
            if query.text and query.sentence:
                cues, _ = state.find_cues(query.sentence, 1, MAX_MOMENTS, None, video.path)
                hit = dataclasses.replace(hit, cues=tuple(*cues.values()))
            if most < MAX_MOMENTS and len(find_spans(hit.windows, hit.scores, most + 1)) > most:
                more = query.address(offset=0, moments=MAX_MOMENTS)
        # The moment with the time, or the nearest one; the best without a time.
        away = [0 if time is None else max(m.start - time, time - m.end, 0) for m in hit.moments]
        number, explanation = away.index(min(away)) if away else None, None
        if number is not None:
            moment = hit.moments[number]
            time = moment.start if time is None else time
            thumbnails = [_frames(video, frame=frame) for frame in moment.window.frames]
            if moment.explanation is not None:
                explanation = {**moment.explanation.to_json(), "thumbnails": thumbnails}
        return {
            **self._model,
            **_hit_json(state, query, hit),
            "time": time or 0.0,
            "windows": len(video.windows),
            "frames": rounded(video.times, 3),
            "frame_prefix": _frames(video) + "&frame=",
            "heat": [
                {"start": window.start, "end": window.end, "score": round(float(score), 6)}
                for window, score in zip(hit.windows, hit.scores, strict=True)
            ],
            "moment": number,
            "more": more,
            "explanation": explanation,
        }

    def export(self, kind: str, moments: Sequence[str], query: PageQuery) -> bytes | IO[bytes]:
        """A file, or an open one, with moments PATH@START-END; a query gives them their scores."""
        if kind not in FORMATS:
            raise BadRequest(f"format is one of {', '.join(FORMATS)}, not {kind[:100]!r}")
        if not 1 <= len(moments) <= MAX_HITS:
            line = f"name 1 to {MAX_HITS} moments with moment=PATH@START-END, not {len(moments)}"
            raise BadRequest(line)
        state = self.index.state()
        asked = self._asked(state, query) if query.asks else None
        cuts = [self._cut(state, asked, text) for text in moments]
        return self.media.zip(cuts) if kind == "zip" else cut_list(kind, cuts, query.sentence or "")

    def _cut(self, state: OpenIndex, asked: Query | None, text: str) -> Cut:
        video, start, end = span_of(state, text)
        score = None
        if asked is not None:
            moments = self.index.in_video(state, asked, video, MAX_MOMENTS).moments
            score = next((m.score for m in moments if m.start < end and start < m.end), None)
        try:
            file = unchanged_file(state, video)
            return Cut(video, file, start, end, score, self.media.timing(file))
        except BadRequest as error:
            line = f"{printable(video.path)}: {error}"
            raise BadRequest(line, error.http_status) from error

    def _asked(self, state: OpenIndex, query: PageQuery) -> Query:
        return Query(
            query.sentence or "",
            query.without or "",
            self.media.sent("picture", query.picture) if query.picture else b"",
            self.media.sent("video", query.by_video) if query.by_video else None,
            moment_of(state, query.like) if query.like else None,
        )

    def _tokens_used(self, sentence: str) -> int | None:
        """How many tokens of a sentence are used if not all are."""
        model = self.index.model
        if not (sentence.strip() and model.tokenize([sentence]).is_cut[0]):
            return None
        (words,) = model.token_strings([sentence])
        return sum(word not in (START, END) for word in words)


@functools.lru_cache(maxsize=1)  # Every page shows them.
def _facts_of(state: OpenIndex) -> dict[str, Any]:
    listing = state.videos.listing
    # In the order of the listing.
    folders = dict.fromkeys(path.rpartition("/")[0] for path in listing["path"].to_pylist())
    return {
        "folder": str(state.folder),
        "videos": state.count,
        "windows": len(state.gallery),
        "hours": round(float(listing["duration"].to_numpy().sum()) / 3600, 3),
        "folders": [folder for folder in folders if folder][:_FOLDERS],
        "unsearchable": state.unsearchable_count,
    }


def outside(time: float, video: IndexedVideo) -> BadRequest:
    return BadRequest(f"t={time:g} is outside the video, which has {video.duration:.1f} s")


def state_of(state: OpenIndex, video: IndexedVideo) -> str:
    """Whether a file is as it was indexed: ok, changed or missing."""
    if state.is_unchanged(video):
        return "ok"
    return "changed" if file_of(state.folder, video.path).exists() else "missing"


def unchanged_file(state: OpenIndex, video: IndexedVideo) -> Path:
    """The path of a file that is as it was indexed; one that was replaced could link anywhere."""
    if (found := state_of(state, video)) != "ok":
        raise BadRequest(*STATES[found])
    return file_of(state.folder, video.path)


def _same_as(state: OpenIndex, hits: Sequence[Hit]) -> list[str | None]:
    """For each hit, the path of a better one whose best moment shows the same."""
    if not all(hit.moments for hit in hits):  # A list of videos.
        return [None] * len(hits)
    moments = [hit.moments[0] for hit in hits]
    parts = [(h.video, m.start, m.end) for h, m in zip(hits, moments, strict=True)]
    same = enumerate(same_moments(state, parts))
    return [None if first == number else hits[first].video.path for number, first in same]


def _hit_json(state: OpenIndex, query: PageQuery, hit: Hit) -> dict[str, Any]:
    video = hit.video
    best = hit.moments[0] if hit.moments else None
    start, shown = (best.start, best.peak) if best else (None, video.duration / 2)
    if hit.cues:  # It opens at what is said.
        start = shown = hit.cues[0].start

    def page(time: float | None) -> str:
        time = None if time is None else min(time, video.duration)
        return query.address(video=video.path, time=time, offset=0)

    return {
        **hit.facts(),
        "path": video.path,
        "name": PurePosixPath(video.path).name,
        "state": state_of(state, video),
        "page": page(start),
        "media": file_address("videos", video.path),
        **_pictures(video, shown),
        "moments": [_moment_json(query, video, moment) for moment in hit.moments],
        "cues": [{**cue._asdict(), "page": page(cue.start)} for cue in hit.cues],
    }


def _moment_json(query: PageQuery, video: IndexedVideo, moment: Moment) -> dict[str, Any]:
    found, frames = moment.to_json(), moment.window.frames
    # Of a long moment, the part around its peak.
    first = max(found["start"], min(moment.peak - MAX_CLIP / 2, found["end"] - MAX_CLIP))
    clip = {"start": f"{first:.3f}", "end": f"{min(first + MAX_CLIP, found['end']):.3f}"}
    alone = query.closed(sentence=None, without=None, picture=None, by_video=None, text=0)
    return {
        **found,
        "like": alone.address(like=f"{video.path}@{moment.peak:.3f}"),
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
    seconds, version = f"{video.times[frame]:.3f}", video.record.sha256[:8]
    return {
        "picture": file_address("pictures", video.path, t=seconds, v=version),
        "thumbnail": _frames(video, frame=frame),
    }


def _frames(video: IndexedVideo, **which: int | str) -> str:
    return file_address("frames", video.path, **which, v=video.record.sha256[:8])
