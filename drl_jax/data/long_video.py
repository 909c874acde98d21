"""Samples videos of any length, shot by shot, by the time at which a viewer sees the frames.

Decoding workers import this module, so it does not import jax.

A film is decoded once, in order, and `fps` frames a second are sampled. The seconds start anew at
each cut and after each cross-fade, so that a shot of a film has the frames that it has as a file of
its own; the mixed frames of a cross-fade are not sampled. A shot that is shorter than
`SHORT_SHOT` has four evenly spaced frames. Frames go to the caller one by one, and a few are held,
so that memory does not depend on the length.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import av
import numpy as np

from drl_jax.data.cuts import LONGEST_FADE, CutFinder
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.pictures import FrameConverter, to_form
from drl_jax.data.video_file import OpenVideo, TimedFrame, VideoError

# A shot that is shorter has `_SHORT_FRAMES` frames, seconds.
SHORT_SHOT, _SHORT_FRAMES = 4.0, 4
# Frames that may become those of a short shot, at most: at least six intervals of the shot.
_HELD = 12
# Of more frames a second, some are left out.
_MOST_FPS = 40
# The frame that is shown at a time may begin this much after it, seconds; half a frame at most.
_LATE = 1 / 24
_SAME = 1e-6


class SampledVideo(NamedTuple):
    """What was sampled of a video.

    Attributes:
      times: float64 [F], when the frames are seen, seconds from the first frame of the file; a
        frame that is shown for longer is sampled again.
      coarse: bool [F], the frames that any `fps` samples: one a second of each shot, and all of a
        short one.
      shots: int [S], the first sampled frame of each shot; begins with 0.
      shot_starts: float64 [S], seconds.
      duration: seconds, to the end of the last frame.
    """

    times: np.ndarray
    coarse: np.ndarray
    shots: np.ndarray
    shot_starts: np.ndarray
    duration: float


def sample_video(
    video: OpenVideo, form: FrameForm, emit: Callable[[np.ndarray], None], fps: float = 1.0
) -> SampledVideo:
    """Decodes a video and samples it.

    Args:
      video: an open file.
      form: form of the frames.
      emit: called with each frame, uint8 [size, size, 3], in order.
      fps: frames a second, at least 1.

    Raises a VideoError if no frame could be decoded.
    """
    sampler, time = _Sampler(form, emit, fps, min(0.5 / video.fps, _LATE)), 0.0
    for (frame, time), end in CutFinder().with_cuts(_some_frames(video)):
        sampler.add(frame, time, end)
    if not sampler.starts:
        raise VideoError("no frame could be decoded")
    return sampler.close(time + 1 / video.fps)


def _some_frames(video: OpenVideo) -> Iterator[TimedFrame]:
    """Decodes frames; leaves some of very many out."""
    taken = -np.inf
    with contextlib.closing(video.timed_frames()) as frames:
        for frame, time in frames:
            if time >= taken + 1 / _MOST_FPS - _SAME:
                taken = time
                yield frame, time


class _Frame:
    """A decoded frame, in its form once it is asked for."""

    def __init__(self, frame: av.VideoFrame, time: float):
        self.time = time
        self._frame: av.VideoFrame | None = frame
        self._image: np.ndarray | None = None

    def image(self, to_rgb: FrameConverter, form: FrameForm) -> np.ndarray:
        if self._image is None:
            self._image = to_form(to_rgb(self._frame), form)
            self._frame = None  # It is much larger.
        return self._image


class _Sampler:
    """Chooses frames of one shot after another."""

    def __init__(
        self, form: FrameForm, emit: Callable[[np.ndarray], None], fps: float, late: float
    ):
        self.starts: list[float] = []
        self._form, self._emit, self._fps, self._late = form, emit, max(1.0, fps), late
        self._to_rgb = FrameConverter(form.as_shown)
        self._times: list[float] = []
        self._coarse: list[bool] = []
        self._shots: list[int] = []
        # Samples that are not emitted yet: the shot may turn out to be short, or to fade.
        self._waiting: list[tuple[float, bool, _Frame]] = []

    def add(self, frame: av.VideoFrame, time: float, end: float | None) -> None:
        """Adds the next frame; `end` is that of the shot before, if one starts here."""
        if not self.starts:
            self._begin(time)
        elif end is not None:
            self._finish(end)
            self._begin(time)
        else:
            self._sample_until(time)
        self._shown = _Frame(frame, time)
        if time - self.starts[-1] >= SHORT_SHOT + LONGEST_FADE:
            self._held = []
            self._release(time - LONGEST_FADE)
        elif not self._held or time >= self._held[-1].time + self._spacing - _SAME:
            self._held.append(self._shown)
            if len(self._held) > _HELD:
                self._held = self._held[::2]
                self._spacing = max(2 * self._spacing, self._held[1].time - self._held[0].time)

    def close(self, duration: float) -> SampledVideo:
        self._finish(duration)
        arrays = (self._times, self._coarse, self._shots, self.starts)
        return SampledVideo(*map(np.array, arrays), duration=duration)

    def _begin(self, time: float) -> None:
        self.starts.append(time)
        self._shots.append(len(self._times))
        self._held: list[_Frame] = []
        self._spacing = 0.0
        self._seconds = self._steps = 0  # On the coarse grid, and on that of `fps`.

    def _sample_until(self, end: float) -> None:
        """Samples the shown frame at all times of the grids before `end`, when another is shown."""
        while True:
            second = self.starts[-1] + self._seconds
            step = self.starts[-1] + self._steps / self._fps
            due, is_coarse = min(second, step), second <= step + _SAME
            if due >= end - self._late:
                return
            self._shown.image(self._to_rgb, self._form)
            self._waiting.append((due, is_coarse, self._shown))
            self._seconds += is_coarse
            self._steps += step <= second + _SAME

    def _finish(self, end: float) -> None:
        """Emits what is left of a shot."""
        self._sample_until(end)
        self._waiting = [sample for sample in self._waiting if sample[0] < end - _SAME]
        if end - self.starts[-1] < SHORT_SHOT - _SAME:
            frames = [frame for frame in (*self._held, self._shown) if frame.time < end - _SAME]
            times = np.array([frame.time for frame in frames])
            wanted = np.linspace(times[0], times[-1], _SHORT_FRAMES)
            nearest = np.abs(times - wanted[:, None]).argmin(axis=1)
            self._waiting = [(times[n], True, frames[n]) for n in dict.fromkeys(nearest.tolist())]
        self._release(np.inf)

    def _release(self, before: float) -> None:
        while self._waiting and self._waiting[0][0] < before:
            time, is_coarse, frame = self._waiting.pop(0)
            self._emit(frame.image(self._to_rgb, self._form))
            self._times.append(float(time))
            self._coarse.append(is_coarse)
