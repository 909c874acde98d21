"""What the JSON API says of a hit; `page/openapi.json` describes it."""

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from drl_jax.search.addresses import PageQuery, file_address
from drl_jax.search.clips import MAX_CLIP
from drl_jax.search.explain import Explanation
from drl_jax.search.hits import Hit, Moment
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.snapshot import IndexSnapshot
from drl_jax.search.word_table import word_rows


def hit_json(index: IndexSnapshot, query: PageQuery, hit: Hit) -> dict[str, Any]:
    """A video, and its moments if it was searched for."""
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


def state_of(index: IndexSnapshot, video: IndexedVideo) -> str:
    """Whether a file is as it was indexed: ok, changed or missing."""
    if index.is_unchanged(video):
        return "ok"
    return "changed" if Path(index.folder / video.path).exists() else "missing"


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
        "like": query.closed(
            sentence=None,
            without=None,
            picture=None,
            by_video=None,
            like=f"{video.path}@{moment.peak:.3f}",
        ).address(),
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


def explanation_json(video: IndexedVideo, moment: Moment) -> dict[str, Any]:
    """Why a moment was found."""
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
