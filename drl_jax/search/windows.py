"""Windows of a video: the parts of which an index stores features.

Worker processes import this module, so it does not import jax.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drl_jax.data.long_video import SampledVideo

# Length of a window, seconds, and the time from one to the next within a shot.
WINDOW_SECONDS = 12.0
_STEP_SECONDS = WINDOW_SECONDS / 2
# Shots are joined if no cut is further than this from an end of the window, seconds.
_ACROSS_CUT = 2.0


class Window(NamedTuple):
    """A part of a video.

    Attributes:
      start: seconds.
      end: seconds.
      frames: int [F], its frames among the sampled ones of the video.
    """

    start: float
    end: float
    frames: tuple[int, ...]


def windows_of(video: SampledVideo, max_frames: int) -> list[Window]:
    """Splits a video into windows.

    A shot of at most `WINDOW_SECONDS` is one window; a longer one has windows of this length, each
    half over the next. Short shots are joined with their neighbours.

    Args:
      video: what was sampled of it.
      max_frames: frames of a window at most; evenly spaced ones if there are more.
    """
    windows = []
    for start, end in _spans(video):
        for first, last in _pieces(start, end):
            inside = np.flatnonzero((video.times >= first) & (video.times < last))
            if len(inside) > max_frames:
                inside = inside[np.linspace(0, len(inside) - 1, num=max_frames, dtype=int)]
            if len(inside):
                windows.append(Window(first, last, tuple(map(int, inside))))
    return windows


def window_at(windows: Sequence[Window], time: float) -> int:
    """Index of the window whose middle is nearest to a time, seconds."""
    return min(
        range(len(windows)), key=lambda n: abs((windows[n].start + windows[n].end) / 2 - time)
    )


def _spans(video: SampledVideo) -> list[tuple[float, float]]:
    """Shots, with short ones joined as far as `_ACROSS_CUT` allows."""
    edges = [*map(float, video.shot_starts), video.duration]
    spans: list[list[float]] = []  # Start, cuts inside, end.
    for start, end in itertools.pairwise(edges):
        joined = [*spans[-1], end] if spans else []
        if joined and _may_join(joined, end - start, spans[-1][-1] - spans[-1][0]):
            spans[-1] = joined
        else:
            spans.append([start, end])
    return [(span[0], span[-1]) for span in spans]


def _may_join(edges: Sequence[float], *lengths: float) -> bool:
    """Whether the parts are worth joining, and every cut is near an end."""
    first, *cuts, last = edges
    near = all(min(cut - first, last - cut) <= _ACROSS_CUT for cut in cuts)
    return near and min(lengths) < _ACROSS_CUT


def _pieces(start: float, end: float) -> list[tuple[float, float]]:
    """Windows of a span; the last one ends with it."""
    if end - start <= WINDOW_SECONDS:
        return [(start, end)]
    count = int(np.ceil((end - start - WINDOW_SECONDS) / _STEP_SECONDS))
    firsts = [start + _STEP_SECONDS * number for number in range(count)]
    pieces = [(first, first + WINDOW_SECONDS) for first in firsts]
    return [*pieces, (end - WINDOW_SECONDS, end)]
