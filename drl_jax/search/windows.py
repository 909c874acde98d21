"""Windows of a video, of which an index stores features, and the moments that they make.

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
# What a window shows after its last frame, seconds.
_LAST_FRAME = 0.25
# Times that differ by less are the same, seconds.
_SAME = 1e-6
# Neighbouring windows are one moment if they are this much of the way from the film's median score
# to the best one's, or within this many deviations of it: all of a short film may be the moment.
_ALIKE, _WITHIN = 0.9, 0.1
# A window that shares more of its time with a better moment than this is no moment of its own.
_MAX_OVERLAP = 0.5


class Window(NamedTuple):
    """A part of a video: start and end in seconds, and its frames among the sampled ones."""

    start: float
    end: float
    frames: tuple[int, ...]


class Span(NamedTuple):
    """A moment: start and end in seconds, and score and index of its best window."""

    start: float
    end: float
    score: float
    window: int


def windows_of(video: SampledVideo, max_frames: int) -> list[Window]:
    """Splits a video into windows of at most `max_frames` frames, one a second as in training.

    A shot that is not longer is one window; a longer one has windows that are each half over the
    next. Very short shots are joined with their neighbours.
    """
    windows, coarse = [], np.flatnonzero(video.coarse)
    times = video.times[coarse]
    for start, end in _shots(video):
        for first, last in _pieces(start, end, float(max_frames)):
            inside = coarse[slice(*np.searchsorted(times, (first - _SAME, last - _SAME)))]
            if len(inside):
                windows.append(Window(first, last, _spread(inside, max_frames)))
    return windows


def windows_around(
    times: np.ndarray, windows: Sequence[Window], number: int, max_frames: int
) -> list[Window]:
    """Windows of `max_frames` frames a second apart, one for each sampled frame near a window.

    They start nearer to it than to its neighbours, and stay inside it and the windows that overlap
    it; there is none around a whole shot. `times` are those of the sampled frames, float64 [F].
    """
    start, end = windows[number].start, windows[number].end
    if end - start < max_frames - _SAME:
        return []
    low, high, limit = start, end, end
    if number and windows[number - 1].end > start + _SAME:
        low = (windows[number - 1].start + start) / 2
    if number + 1 < len(windows) and windows[number + 1].start < end - _SAME:
        high, limit = (start + windows[number + 1].start) / 2, windows[number + 1].end
    first, last = np.searchsorted(times, (low - _SAME, high - _SAME))
    around = []
    for time in times[first:last]:
        wanted = time + np.arange(max_frames)
        if wanted[-1] > limit - _SAME:
            break
        after = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
        frames = after - (wanted - times[after - 1] <= times[after] - wanted)  # The nearest.
        if (np.diff(frames) > 0).all() and times[frames[-1]] < limit:
            around.append(_spanning(times, frames, limit))
    return around


def inner_windows(times: np.ndarray, window: Window, max_frames: int) -> list[Window]:
    """Shorter windows inside one: evenly spaced frames of a half or a quarter of it."""
    inside = np.arange(window.frames[0], window.frames[-1] + 1)
    inner = []
    for length in (len(inside) // share + 1 for share in (2, 4)):
        if length == 1 or length == len(inside):
            continue
        for first in range(0, len(inside) - length + 1, max(1, length // 4)):
            frames = _spread(inside[first : first + length], max_frames)
            inner.append(_spanning(times, frames, window.end))
    return inner


def window_at(windows: Sequence[Window], time: float) -> int:
    """Index of the window that has a time, seconds; of several or none, the one nearest to it."""

    def distance(number: int) -> tuple[bool, float]:
        start, end, _ = windows[number]
        return not start <= time < end, abs((start + end) / 2 - time)

    return min(range(len(windows)), key=distance)


def _spread(frames: np.ndarray, most: int) -> tuple[int, ...]:
    if len(frames) > most:
        frames = frames[np.linspace(0, len(frames) - 1, num=most, dtype=int)]
    return tuple(frames.tolist())


def _spanning(times: np.ndarray, frames: Sequence[int] | np.ndarray, limit: float) -> Window:
    """The window of frames, from the first to a little after the last."""
    start, last = times[[frames[0], frames[-1]]].tolist()
    return Window(start, min(last + _LAST_FRAME, limit), tuple(map(int, frames)))


def _shots(video: SampledVideo) -> list[tuple[float, float]]:
    """Shots, with short ones joined as far as `_ACROSS_CUT` allows."""
    shots: list[list[float]] = []  # Start, cuts inside, end.
    for start, end in itertools.pairwise([*map(float, video.shot_starts), video.duration]):
        cuts = shots[-1][1:] if shots else []
        distances = [min(cut - shots[-1][0], end - cut) for cut in cuts]
        if cuts and max(distances) <= _ACROSS_CUT and distances[-1] < _ACROSS_CUT:
            shots[-1].append(end)
        else:
            shots.append([start, end])
    return [(shot[0], shot[-1]) for shot in shots]


def _pieces(start: float, end: float, seconds: float) -> list[tuple[float, float]]:
    """Windows of a span; the last one ends with it."""
    if end - start <= seconds:
        return [(start, end)]
    step = seconds / 2
    firsts = [start + step * n for n in range(int(np.ceil((end - start - seconds) / step)))]
    return [*((first, first + seconds) for first in firsts), (end - seconds, end)]


def find_spans(
    windows: Sequence[Window], scores: np.ndarray, most: int, deviation: float = 0.0
) -> list[Span]:
    """Finds the `most` best moments of a video, the best first, from scores of its windows, [W].

    The best window, joined with its neighbours that overlap one another and stand out of the film
    as much, is a moment; then the best of the windows that do not overlap it by more than half, and
    so on. If all that is joined overlaps the best window, it may be alike because of what they
    share, and the window is the moment. `deviation` is of similarities that mean nothing, or 0.
    """
    found: list[Span] = []
    scores = np.array(scores, np.float64)  # Of windows that are in no moment yet; else -inf.
    median = np.median(scores)
    # Neighbours that only touch are of two shots.
    overlaps = [before.end > after.start for before, after in itertools.pairwise(windows)]
    for best in np.argsort(-scores, kind="stable").tolist():
        window = windows[best]
        is_taken = scores[best] == -np.inf
        if is_taken or any(_overlap(window, span) > _MAX_OVERLAP for span in found):
            continue
        above = max((1 - _ALIKE) * (scores[best] - median), _WITHIN * deviation)
        is_alike = scores >= scores[best] - above
        first = last = best
        while first and is_alike[first - 1] and overlaps[first - 1]:
            first -= 1
        while last + 1 < len(windows) and is_alike[last + 1] and overlaps[last]:
            last += 1
        joined = windows[first : last + 1]
        if all(_overlap(window, other) > 0 for other in joined):
            joined = [window]
        start, end = min(w.start for w in joined), max(w.end for w in joined)
        found.append(Span(start, end, float(scores[best]), best))
        scores[first : last + 1] = -np.inf
        if len(found) == most:
            break
    return found


def _overlap(window: Window, other: Window | Span) -> float:
    """Share of a window's time that another one, or a moment, covers."""
    shared = min(window.end, other.end) - max(window.start, other.start)
    return max(0.0, shared) / max(window.end - window.start, 1e-9)
