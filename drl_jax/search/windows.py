"""Windows of a video: the parts of which an index stores features.

Worker processes import this module, so it does not import jax.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drl_jax.data.long_video import SampledVideo

# A file of at most this length is one window, seconds.
SHORT_VIDEO_SECONDS = 12.0
# Shots are joined if no cut is further than this from an end of the window, seconds: the frames of
# another shot take the place of frames that show the moment.
_ACROSS_CUT = 0.5


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

    A window has as many seconds as the model has frames, one a second as in training. A shot that
    is not longer is one window; a longer one has windows that are each half over the next. Very
    short shots are joined with their neighbours.

    Args:
      video: what was sampled of it.
      max_frames: frames of a window at most, and its seconds.
    """
    windows = []
    for start, end in _spans(video):
        for first, last in _pieces(start, end, float(max_frames)):
            inside = np.flatnonzero((video.times >= first) & (video.times < last))
            if len(inside) > max_frames:
                inside = inside[np.linspace(0, len(inside) - 1, num=max_frames, dtype=int)]
            if len(inside):
                windows.append(Window(first, last, tuple(map(int, inside))))
    return windows


def window_at(windows: Sequence[Window], time: float) -> int:
    """Index of the window that has a time, seconds; of several or none, the one nearest to it."""

    def distance(window: Window) -> tuple[bool, float]:
        is_outside = not window.start <= time < window.end
        return is_outside, abs((window.start + window.end) / 2 - time)

    return min(range(len(windows)), key=lambda number: distance(windows[number]))


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


def _pieces(start: float, end: float, seconds: float) -> list[tuple[float, float]]:
    """Windows of a span; the last one ends with it."""
    if end - start <= seconds:
        return [(start, end)]
    step = seconds / 2
    count = int(np.ceil((end - start - seconds) / step))
    firsts = [start + step * number for number in range(count)]
    pieces = [(first, first + seconds) for first in firsts]
    return [*pieces, (end - seconds, end)]
