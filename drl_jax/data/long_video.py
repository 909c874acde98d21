"""Samples videos of any length, shot by shot.

Decoding workers import this module, so it does not import jax.

A film is decoded once, in order, and one frame a second is sampled. The second starts anew at each
hard cut: a shot of a film then has the frames that the same shot has as a file of its own. Frames
go to the caller one by one, so that memory does not depend on the length.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from drl_jax.data.frame_form import FrameForm
from drl_jax.data.video import (
    RgbConverter,
    VideoError,
    count_frames,
    decode,
    ffmpeg_errors,
    to_form,
)

# Frames a second that are compared to find cuts, at most.
_COMPARED_FPS = 12
# Side of the picture that is compared, pixels.
_COMPARED_SIDE = 64
# A cut is a change of at least this many levels of hue, saturation and value on average, and at
# least this many times that of its neighbours. All cuts between 150 clips of `shapes` (val) and no
# other frame pass; so does the only cut of the real clips that people see as one.
_CUT_LEVELS, _CUT_RATIO = 15.0, 2.0
# Neighbours on each side.
_NEIGHBOURS = 2


class SampledVideo(NamedTuple):
    """What was sampled of a video.

    Attributes:
      times: float64 [F], of the frames, seconds from the first frame of the file.
      shots: int [S], the first sampled frame of each shot; begins with 0.
      shot_starts: float64 [S], seconds.
      duration: seconds, to the end of the last frame.
    """

    times: np.ndarray
    shots: np.ndarray
    shot_starts: np.ndarray
    duration: float


class _Decoded(NamedTuple):
    """A decoded frame, and how much it differs from the last one that was compared.

    `change` is None for a frame that is not compared, and for the first.
    """

    frame: av.VideoFrame
    time: float
    change: float | None


def sample_video(path: Path, form: FrameForm, emit: Callable[[np.ndarray], None]) -> SampledVideo:
    """Decodes a video and samples one frame a second of each shot.

    Args:
      path: any file that FFmpeg reads.
      form: form of the frames.
      emit: called with each frame, uint8 [size, size, 3], in order.

    Raises:
      VideoError: no frame could be decoded.
      Unavailable: the file cannot be read.
    """
    with ffmpeg_errors(path):
        _, fps = count_frames(path)
        stride = max(1, round(fps))
        to_rgb, times, shots, starts = RgbConverter(), [], [], []
        since, time = 0, 0.0
        for decoded, is_cut in _with_cuts(_compared(path, fps)):
            time = decoded.time
            if is_cut or not starts:
                shots.append(len(times))
                starts.append(time)
                since = 0
            if since % stride == 0:
                emit(to_form(to_rgb(decoded.frame), form))
                times.append(time)
            since += 1
    if not times:
        raise VideoError("no frame could be decoded")
    return SampledVideo(np.array(times), np.array(shots), np.array(starts), time + 1 / fps)


def _compared(path: Path, fps: float) -> Iterator[_Decoded]:
    """Decodes all frames; every n-th is compared with the last one that was."""
    every = max(1, round(fps / _COMPARED_FPS))
    first = before = None
    shrink = _Shrinker()
    with contextlib.closing(decode(path)) as decoded:
        frames = (frame for frame in decoded if frame is not None)
        for number, frame in enumerate(frames):
            # Without timestamps, assume a constant frame rate.
            time = number / fps if frame.time is None else frame.time
            first = time if first is None else first
            change = None
            if number % every == 0:
                small = shrink(frame)
                change = None if before is None else _change(before, small)
                before = small
            yield _Decoded(frame, time - first, change)


class _Shrinker:
    """Converts frames to small pictures, int16 [side, side, 3] of hue, saturation and value."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        side = _COMPARED_SIDE
        # A cut shows with any filter, and this one takes a third of the time of swscale's default.
        small = self._reformatter.reformat(
            frame, side, side, "rgb24", interpolation="FAST_BILINEAR"
        )
        return np.asarray(Image.fromarray(small.to_ndarray()).convert("HSV"), np.int16)


def _change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean absolute difference of hue (which is a circle), saturation and value, in levels."""
    difference = np.abs(after - before)
    hue = difference[..., 0]
    difference[..., 0] = np.minimum(hue, 256 - hue)
    return float(difference.mean())


def _with_cuts(frames: Iterator[_Decoded]) -> Iterator[tuple[_Decoded, bool]]:
    """Adds whether a shot starts at each frame; looks a few compared frames ahead."""
    pending: collections.deque[_Decoded] = collections.deque()
    before: collections.deque[float] = collections.deque(maxlen=_NEIGHBOURS)
    compared = 0  # Of the pending frames.

    def decided() -> tuple[_Decoded, bool]:
        nonlocal compared
        item = pending.popleft()
        if item.change is None:
            return item, False
        compared -= 1
        after = [later.change for later in pending if later.change is not None][:_NEIGHBOURS]
        neighbours = [*before, *after]
        is_cut = bool(before) and item.change >= max(
            _CUT_LEVELS, _CUT_RATIO * sum(neighbours) / len(neighbours)
        )
        before.append(item.change)
        return item, is_cut

    for item in frames:
        pending.append(item)
        compared += item.change is not None
        while compared > _NEIGHBOURS:
            yield decided()
    while pending:
        yield decided()
