"""Finds the cuts and the cross-fades of a film while it is decoded.

Decoding workers import this module, so it does not import jax.

A cut is judged by what is shown before and after it, not by one jump. Two pictures are compared
without their mean colours and by the share of their structure that differs, so that light that
changes is no cut; and if a picture after a jump is like one before it, it was a flash. A cross-fade
is a run of pictures that are mixtures of the one before and the one after it.
"""

import collections
import math
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from drl_jax.data.video_file import TimedFrame

# Pictures a second that are compared, at most, and their side, pixels.
_COMPARED_FPS, _SIDE = 15, 32
# A cross-fade is not longer, seconds.
LONGEST_FADE = 1.0
# What comes back within this time was not gone, seconds.
_AROUND = 0.5
# Share of the structure that a cut changes; the second number where the mean colour stays within
# `_SAME_COLOUR` levels, because something that moves fast changes as much as some cuts.
_CHANGED, _CHANGED_ALONE, _SAME_COLOUR = 0.45, 0.8, 6.0
# A cut changes at least this many times as much as the pictures next to it do, of which there are
# two on each side.
_RATIO, _NEXT = 2.0, 2
# A mixture of two pictures differs from the nearest point between them by less than this share of
# their squared distance. A larger step between two mixtures is a cut.
_UNMIXED, _CUT_IN_FADE = 0.1, 0.75
# Energy of noise, squared levels: pictures of a plain colour do not differ.
_NOISE = 32.0
# A mean colour of that length is almost black, and has no hue, levels.
_BLACK = 8.0
_SAME = 1e-6


class _Picture(NamedTuple):
    """A small picture.

    Attributes:
      time: seconds.
      colour: its mean, levels.
      hue: the direction of the mean; shorter if it is almost black.
      pixels: float32 [N], without the mean, so that its dot product with itself is the energy.
      energy: squared levels.
      step: share of the structure that differs from the picture before.
    """

    time: float
    colour: tuple[float, ...]
    hue: tuple[float, ...]
    pixels: np.ndarray
    energy: float
    step: float


class CutFinder:
    """Compares frames in the order in which they are shown, and holds half a second of them."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._pictures: list[_Picture] = []
        self._next = 0  # The picture that is judged next.
        self._start = 0  # The first picture of the shot.

    def with_cuts(self, frames: Iterator[TimedFrame]) -> Iterator[tuple[TimedFrame, float | None]]:
        """Yields each frame, with the end of the shot before, seconds, if a shot starts at it."""
        pending: collections.deque[tuple[TimedFrame, bool]] = collections.deque()
        for frame, time in frames:
            last = self._pictures[-1].time if self._pictures else -np.inf
            is_compared = time >= last + 1 / _COMPARED_FPS - _SAME
            pending.append(((frame, time), is_compared))
            if is_compared:
                self._pictures.append(self._picture(frame, time))
            while pending and (not pending[0][1] or self._is_ready()):
                yield self._judged(*pending.popleft())
        while pending:
            yield self._judged(*pending.popleft())

    def _picture(self, frame: av.VideoFrame, time: float) -> _Picture:
        # A cut shows with any filter, and this one takes a third of the time of swscale's default.
        small = self._reformatter.reformat(
            frame, _SIDE, _SIDE, "rgb24", interpolation="FAST_BILINEAR"
        )
        pixels = small.to_ndarray().reshape(-1, 3).astype(np.float32)
        mean = pixels.mean(axis=0)
        pixels = (pixels - mean).ravel() / np.float32(_SIDE * 3**0.5)
        colour = tuple(mean.tolist())
        hue = tuple(level / (math.hypot(*colour) + _BLACK) for level in colour)
        picture = _Picture(time, colour, hue, pixels, float(pixels @ pixels), 0.0)
        if not self._pictures:
            return picture
        return picture._replace(step=_difference(self._pictures[-1], picture))

    def _is_ready(self) -> bool:
        """Whether enough is known of what follows the next picture."""
        judged, last = self._pictures[self._next], self._pictures[-1]
        follow = len(self._pictures) - 1 - self._next
        return follow >= _NEXT and last.time - judged.time >= _AROUND - _SAME

    def _judged(self, frame: TimedFrame, is_compared: bool) -> tuple[TimedFrame, float | None]:
        if not is_compared:
            return frame, None
        last = self._last_before(self._next)
        end = None if last is None else self._pictures[last + 1].time
        if end is not None:
            self._start = self._next
        self._next += 1
        # Forget what is too old to be looked at.
        oldest = frame[1] - LONGEST_FADE - _AROUND - _SAME
        while self._next > _NEXT + 1 and self._pictures[0].time < oldest:
            del self._pictures[0]
            self._next, self._start = self._next - 1, max(0, self._start - 1)
        return frame, end

    def _last_before(self, first: int) -> int | None:
        """The last picture of the shot before, if a picture is the first of a shot."""
        for last in range(self._start, first):
            near = self._pictures[first].time - self._pictures[last].time <= LONGEST_FADE + _SAME
            if (near or last == first - 1) and self._is_cut(last, first):
                return last
        return None

    def _is_cut(self, last: int, first: int) -> bool:
        """Whether one shot ends with a picture and another begins with a later one."""
        pictures = self._pictures
        before, after = pictures[last], pictures[first]
        difference = _difference(before, after)
        if difference < _CHANGED:
            return False
        colours = zip(before.colour, after.colour, strict=True)
        is_alike = max(abs(one - other) for one, other in colours) < _SAME_COLOUR
        if is_alike and difference < _CHANGED_ALONE:
            return False
        near = pictures[max(1, last + 1 - _NEXT) : last + 1]
        near += pictures[first + 1 : first + 1 + _NEXT]
        if near and difference < _RATIO * statistics.median(picture.step for picture in near):
            return False
        steps = first - last
        if steps > 1:
            shares = [_share(before, mixed, after) for mixed in pictures[last + 1 : first]]
            if None in shares:
                return False
            # Those of an even fade grow by 1 / steps.
            growth = np.diff([0.0, *shares, 1.0])
            ends = min(growth[0], growth[-1])
            if ends < 0.5 / steps or growth.max() > min(2 / steps, _CUT_IN_FADE):
                return False
        following = pictures[first + 1 : first + 2]
        if following and _difference(before, following[0]) >= _CHANGED:
            share = _share(before, after, following[0])
            if share is not None and share < 1 - 0.5 / (steps + 1):
                return False  # The fade goes on.
        gone = [p for p in pictures[: last + 1] if p.time > before.time - _AROUND + _SAME]
        come = [p for p in pictures[first:] if p.time < after.time + _AROUND - _SAME]
        return all(_difference(one, other) >= _CHANGED for one in gone for other in come)


def _difference(one: _Picture, other: _Picture) -> float:
    """Share of the structure of two pictures that differs, or how far their hues do: 0 to 1."""
    both = one.energy + other.energy
    structure = (both - 2 * float(one.pixels @ other.pixels)) / (both + _NOISE)
    return max(structure, math.dist(one.hue, other.hue))


def _share(before: _Picture, mixed: _Picture, after: _Picture) -> float | None:
    """Share of the later picture in a mixture of two; None if it is no mixture."""
    step = after.pixels - before.pixels
    change = mixed.pixels - before.pixels
    distance = float(step @ step) + _NOISE
    share = float(change @ step) / distance
    rest = float(change @ change) - share * share * float(step @ step)
    return share if rest <= _UNMIXED * distance else None
