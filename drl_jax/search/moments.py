"""Moments of a video: the parts of it that answer a query, from the scores of its windows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drl_jax.search.windows import Window

# Neighbouring windows are one moment if they are this much of the way from the film's median score
# to the best one's, or within this many deviations of it: all of a short film may be the moment.
_ALIKE, _WITHIN = 0.9, 0.1
# A window that shares more of its time with a better moment than this is no moment of its own.
_MAX_OVERLAP = 0.5


class Span(NamedTuple):
    """A moment, without what explains it.

    Attributes:
      start: seconds.
      end: seconds.
      score: of its best window.
      window: index of its best window.
    """

    start: float
    end: float
    score: float
    window: int


def find_spans(
    windows: Sequence[Window], scores: np.ndarray, most: int, deviation: float = 0.0
) -> list[Span]:
    """Finds the best moments of a video.

    The best window, joined with its neighbours that overlap one another and score alike, is a
    moment; then the best of the windows that do not overlap it by more than half, and so on. Alike
    is what stands out of the film as much: it is the same for sentences, pictures and videos. If
    all that is joined overlaps the best window, it may be alike because of what they share, and
    the window is the moment.

    Args:
      windows: of the video, by their start; refined ones in the place of those that they refine.
      scores: float [W].
      most: number of moments at most.
      deviation: of similarities that mean nothing (`calibration`); 0 if it is not known.

    Returns:
      The moments, the best first.
    """
    found: list[Span] = []
    scores = np.array(scores, np.float64)  # Of windows that are in no moment yet; else -inf.
    median = np.median(scores)
    for best in np.argsort(-scores, kind="stable"):
        window = windows[best]
        is_taken = scores[best] == -np.inf
        if is_taken or any(_overlap(window, span) > _MAX_OVERLAP for span in found):
            continue
        first = last = int(best)
        above = scores[best] - median
        least = scores[best] - max((1 - _ALIKE) * above, _WITHIN * deviation)
        while first > 0 and _joins(windows, scores, first - 1, first, least):
            first -= 1
        while last + 1 < len(windows) and _joins(windows, scores, last + 1, last, least):
            last += 1
        joined = windows[first : last + 1]
        if all(_overlap(window, other) > 0 for other in joined):
            joined = [window]
        start, end = min(w.start for w in joined), max(w.end for w in joined)
        found.append(Span(start, end, float(scores[best]), int(best)))
        scores[first : last + 1] = -np.inf
        if len(found) == most:
            break
    return found


def _joins(
    windows: Sequence[Window], scores: np.ndarray, new: int, neighbour: int, least: float
) -> bool:
    """Whether a window overlaps its neighbour and scores at least so much.

    Windows that only touch are of two shots.
    """
    earlier, later = sorted((new, neighbour))
    return bool(windows[earlier].end > windows[later].start and scores[new] >= least)


def _overlap(window: Window, span: Span) -> float:
    """Share of a window's time that a moment covers."""
    shared = min(window.end, span.end) - max(window.start, span.start)
    return max(0.0, shared) / max(window.end - window.start, 1e-9)
