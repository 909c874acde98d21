"""Samples the frames of video files, and resizes them.

Decoding workers import this module, so it does not import jax.

With the default form of frames and the clock "frames", the result is bit for bit that of the
reference (decord, PIL, torchvision's crop) wherever decord decodes correctly.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import av
import numpy as np

from drl_jax.data.frame_form import FrameForm
from drl_jax.data.pictures import FrameConverter, to_form, what_is_changed
from drl_jax.data.video_file import OpenVideo, VideoError, VideoFile, open_video

# Start and end of a part of a video, seconds.
Span = tuple[float, float]
# Black in limited-range video decodes to a few levels above 0.
_BLACK_LEVEL = 8
# The frame that is shown at a time may begin this much after it, if it is nearer, seconds.
_LATEST = 0.5
# Times of two samples that differ by more are those of different moments, seconds.
_ANOTHER_MOMENT = 0.5
_SAME = 1e-6
# Pictures that are kept while a file is decoded of which the times are not known before.
_KEPT = 256


def sample_positions(
    n_frames: int, fps: float, max_frames: int, span: Span | None = None
) -> list[int]:
    """Samples one frame per second, and evenly spaced ones of these if there are too many.

    Args:
      n_frames: number of frames of the video.
      fps: average frame rate; as in the reference, the stride is this number rounded, at least 1.
      max_frames: maximum number of sampled frames.
      span: only sample from the frame at its start to the frame at its end, inclusive.

    Returns:
      Increasing frame indices; empty if the span starts after the last frame.
    """
    first, last = 0, n_frames - 1
    if span is not None:
        first, last = int(span[0] * fps), min(int(span[1] * fps), last)
    return _evenly(range(first, last + 1, max(1, round(fps))), max_frames)


def sample_times(
    times: np.ndarray, duration: float, max_frames: int, span: Span | None = None
) -> list[int]:
    """The same by the time at which frames are seen: what is shown at each second.

    A frame that begins within half a second is taken if it is nearer. Pictures that are shown for
    a second or longer are all sampled, and each of them once.

    Args:
      times: float64 [N], when the frames are seen, seconds; they do not decrease.
      duration: seconds to the end of the last frame.
    """
    if not len(times):
        return []
    start, end = span or (0.0, np.inf)
    # What remains of the last second shows one frame of a film, or a picture that stands.
    stands = duration - times[-1] >= _LATEST
    last = duration - _SAME if stands else times[-1] + _SAME
    seconds = np.arange(start, min(end + _SAME, last), 1.0)
    shown = np.maximum(np.searchsorted(times, seconds, "right") - 1, 0)
    following = np.minimum(shown + 1, len(times) - 1)
    late = times[following] - seconds
    is_nearer = (late < np.minimum(seconds - times[shown], _LATEST)) & (times[following] <= end)
    lengths = np.diff(np.append(times, duration))
    stills = np.flatnonzero((lengths >= 1 - _SAME) & (times >= start) & (times <= end))
    chosen = np.where(is_nearer, following, shown)
    return _evenly(np.unique(np.concatenate([chosen, stills])).tolist(), max_frames)


def _evenly(positions: Sequence[int], most: int) -> list[int]:
    if len(positions) <= most:
        return list(positions)
    return [positions[i] for i in np.linspace(0, len(positions) - 1, num=most, dtype=int)]


def read_frames(
    path: VideoFile,
    max_frames: int,
    form: FrameForm,
    span: Span | None = None,
    clock: str = "frames",
) -> np.ndarray:
    """Like `read_timed_frames`, without the times: uint8 [F, size, size, 3]."""
    return read_timed_frames(path, max_frames, form, span, clock)[0]


def read_timed_frames(
    path: VideoFile,
    max_frames: int,
    form: FrameForm,
    span: Span | None = None,
    clock: str = "frames",
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes the sampled frames of a video.

    Damaged packets are skipped; a truncated file gives the frames before its end.

    Args:
      path: any file that FFmpeg reads.
      max_frames: how many are sampled at most.
      form: form of the frames.
      span: only sample this part of the video.
      clock: one of `config.FRAME_CLOCKS`: "frames" is `sample_positions`, the reference's rule, and
        "time" is `sample_times`.

    Returns:
      Frames uint8 [F, size, size, 3], 1 <= F <= max_frames, and their presentation times float64
      [F], seconds from the first frame of the file.

    Raises:
      VideoError: no frame could be decoded.
      Unavailable: the file cannot be read.
    """
    with open_video(path, form.as_shown) as video:
        return sampled_frames(video, max_frames, form, span, clock)


def sampled_frames(
    video: OpenVideo, max_frames: int, form: FrameForm, span: Span | None, clock: str
) -> tuple[np.ndarray, np.ndarray]:
    """The same of an open video."""
    to_picture, kept = FrameConverter(form.as_shown), {}

    def convert(frame: av.VideoFrame) -> np.ndarray:
        return to_form(to_picture(frame), form)

    if clock == "time":
        if video.is_certain:
            times = video.times
        else:
            times, kept = _read_candidates(video, span, convert)
        length = float(times[-1]) + video.last_length if len(times) else 0.0
        positions = sample_times(times, length, max_frames, span)
    else:
        length = video.count / video.fps
        positions = sample_positions(video.count, video.fps, max_frames, span)
    if span is not None and video.count and not positions:
        raise VideoError(f"its span {span[0]:g}-{span[1]:g} s is outside the file ({length:.1f} s)")
    if positions and kept.keys() >= set(positions):
        return _stacked([kept[number] for number in positions]), times[positions]
    was_certain = video.is_certain
    frames, seconds = video.read(positions, convert)
    if clock == "time" and was_certain and not video.is_certain:
        return sampled_frames(video, max_frames, form, span, clock)
    return _stacked(frames), np.array(seconds)


def _read_candidates(
    video: OpenVideo, span: Span | None, convert: Callable[[av.VideoFrame], np.ndarray]
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Times of a file that says them only while it is decoded, and pictures on both sides of each
    second: of these, `sample_times` takes some. Of a long file, not all pictures are kept."""
    second, end = span or (0.0, np.inf)
    times: list[float] = []
    kept: dict[int, np.ndarray] = {}
    last: list[tuple[int, av.VideoFrame]] = []
    with contextlib.closing(video.timed_frames()) as frames:
        for number, (frame, time) in enumerate(frames):
            times.append(time)
            if time >= second and len(kept) < _KEPT:
                kept |= {n: convert(f) for n, f in (*last, (number, frame)) if n not in kept}
                second += np.floor(time - second) + 1
            last = [(number, frame)]
            if time > end + 1:
                break
    kept |= {number: convert(frame) for number, frame in last if number not in kept}
    return np.array(times), kept


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """Result of decoding a file completely.

    Attributes:
      frames: number of decoded frames.
      packets: number of packets, by which the clock "frames" counts.
      damaged_packets: number of packets that could not be decoded.
      fps: average frame rate.
      duration: duration in the file's header, seconds; 0 if it has none.
      times: float64 [F], when the frames are seen, seconds.
      black: whether all sampled frames are black.
      changed: what `as_shown` changes (`pictures.what_is_changed`), sorted.
    """

    frames: int
    packets: int
    damaged_packets: int
    fps: float
    duration: float
    times: np.ndarray
    black: bool
    changed: tuple[str, ...]

    def positions(self, max_frames: int, span: Span | None, clock: str) -> list[int]:
        """Numbers of the frames that `read_frames` samples."""
        if clock == "time":
            length = float(self.times[-1]) + 1 / self.fps
            return sample_times(self.times, length, max_frames, span)
        return sample_positions(self.packets, self.fps, max_frames, span)

    def clocks_differ(self, max_frames: int, span: Span | None) -> bool:
        """Whether the two clocks sample other moments of the file."""
        both = (self.positions(max_frames, span, clock) for clock in ("frames", "time"))
        one, other = (self.times[[n for n in found if n < self.frames]] for found in both)
        return len(one) != len(other) or bool((np.abs(one - other) > _ANOTHER_MOMENT).any())


def inspect_video(path: VideoFile, max_frames: int, form: FrameForm) -> VideoFacts:
    """Decodes a file completely; arguments and errors as of `read_frames`."""
    with open_video(path) as video:
        wanted = set(sample_positions(video.count, video.fps, max_frames))
        to_picture, sampled, times = FrameConverter(form.as_shown), [], []
        changed = {"transparent"} if video.has_alpha_plane else set()
        for number, (frame, time) in enumerate(video.timed_frames()):
            if number in wanted:
                sampled.append(to_form(to_picture(frame), form))
            changed |= what_is_changed(frame)
            times.append(time)
        black = bool(_stacked(sampled).max() <= _BLACK_LEVEL)
        return VideoFacts(
            len(times),
            video.count,
            video.damaged_packets,
            video.fps,
            video.header_duration,
            np.array(times),
            black,
            tuple(sorted(changed)),
        )


def _stacked(frames: list[np.ndarray]) -> np.ndarray:
    if not frames:
        raise VideoError("no frame could be decoded")
    return np.stack(frames)
