"""Video files to frames: decode, sample, resize. No jax in here: build workers import it.

The result equals the reference's (decord + PIL + torchvision's crop) bit for bit wherever a correct
decoder can: one sequential pass of one thread, frames counted as decoded, no seeking (it picks
wrong frames in files with edit lists or B-frames in AVI), swscale's default flags.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

# What counts as a video file in a folder.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv"),
    *(".flv", ".mpg", ".mpeg", ".3gp", ".ogv", ".gif"),
)
# Seconds from the start of a video: from, to.
Span = tuple[float, float]
# Beyond this ratio of sides the resize to a square's short side would not fit in memory.
_MAX_ASPECT_RATIO = 64
# Black in a video's limited range decodes to a few levels above 0.
_BLACK_LEVEL = 8


class VideoError(ValueError):
    """A file that gives no frames; the message says why, without the path."""


def sample_positions(
    n_frames: int, fps: float, max_frames: int, span: Span | None = None
) -> list[int]:
    """Which frames to take: one a second, thinned out evenly if these are too many.

    Args:
      n_frames: frames of the video.
      fps: its average rate; the stride is this number rounded (the reference's), at least 1.
      max_frames: how many to return at most.
      span: only from the frame at its start to the frame at its end, that one included.

    Returns:
      Increasing frame numbers; none if the span starts after the last frame.
    """
    first, last = 0, n_frames - 1
    if span is not None:
        first, last = int(span[0] * fps), min(int(span[1] * fps), last)
    positions = range(first, last + 1, max(1, round(fps)))
    if len(positions) <= max_frames:
        return list(positions)
    return [positions[i] for i in np.linspace(0, len(positions) - 1, num=max_frames, dtype=int)]


def resize_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Bicubic resize of the short side to `size`, then the central square.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result, pixels.

    Returns:
      uint8 [size, size, 3].

    Raises:
      VideoError: the picture is too thin to be resized.
    """
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    if long > _MAX_ASPECT_RATIO * short:
        raise VideoError(f"picture of {width} x {height} pixels is too thin to resize")
    # torchvision's arithmetic: the long side is cut, the crop's offset rounded half to even.
    scaled = int(size * long / short)
    new_width, new_height = (size, scaled) if width <= height else (scaled, size)
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def read_frames(path: Path, max_frames: int, size: int, span: Span | None = None) -> np.ndarray:
    """The frames of `read_timed_frames`: uint8 [F, size, size, 3]."""
    return read_timed_frames(path, max_frames, size, span)[0]


def read_timed_frames(
    path: Path, max_frames: int, size: int, span: Span | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a video's sampled frames.

    Damaged packets are skipped; a file that ends early gives the frames it has.

    Args:
      path: any file that FFmpeg reads.
      max_frames: see `sample_positions`.
      size: side of the square frames, pixels.
      span: only this part of the video.

    Returns:
      uint8 [F, size, size, 3], 1 <= F <= max_frames, and when each is shown, float64 [F], seconds
      from the first frame of the file.

    Raises:
      VideoError: no frame could be decoded; the message says why.
    """
    with _readable():
        n_frames, fps = _count_frames(path)
        positions = sample_positions(n_frames, fps, max_frames, span)
        if n_frames and not positions:
            raise VideoError(
                f"its span {span[0]:g}-{span[1]:g} s lies outside the file ({n_frames / fps:.1f} s)"
            )
        wanted, sampled, times = set(positions), [], []
        to_rgb, first = _RgbConverter(), None
        with contextlib.closing(_decode(path)) as decoded:
            frames = (frame for frame in decoded if frame is not None)
            for position, frame in enumerate(frames):
                # Files without times of their frames are taken to have even ones.
                time = position / fps if frame.time is None else frame.time
                first = time if first is None else first
                if position in wanted:
                    sampled.append(resize_crop(to_rgb(frame), size))
                    times.append(time - first)
                if position >= positions[-1]:
                    break
    return _stacked(sampled), np.array(times)


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """What a whole decode of a file finds.

    Attributes:
      frames: frames that could be decoded.
      damaged_packets: packets that could not.
      fps: average rate.
      duration: seconds that the file says it lasts; 0 where it says nothing.
      variable_rate: whether more than one in twenty frames lasts longer or shorter than most.
      black: whether the frames that would be sampled show nothing.
    """

    frames: int
    damaged_packets: int
    fps: float
    duration: float
    variable_rate: bool
    black: bool


def inspect_video(path: Path, max_frames: int, size: int) -> VideoFacts:
    """Decodes all of a file and judges it as `read_frames` would.

    Args:
      path: any file that FFmpeg reads.
      max_frames: see `sample_positions`.
      size: side of the square frames, pixels.

    Raises:
      VideoError: what `read_frames` raises for the whole file.
    """
    with _readable():
        n_frames, fps = _count_frames(path)
        wanted, sampled = set(sample_positions(n_frames, fps, max_frames)), []
        to_rgb, times, frames, damaged = _RgbConverter(), [], 0, 0
        for frame in _decode(path):
            if frame is None:
                damaged += 1
                continue
            if frames in wanted:
                sampled.append(resize_crop(to_rgb(frame), size))
            frames += 1
            times.append(frame.time)
        duration = _stated_duration(path)
    black = bool(_stacked(sampled).max() <= _BLACK_LEVEL)
    return VideoFacts(frames, damaged, fps, duration, _varies(times), black)


def _stacked(frames: list[np.ndarray]) -> np.ndarray:
    if not frames:
        raise VideoError("no frame could be decoded")
    return np.stack(frames)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """FFmpeg's errors as VideoError."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"cannot be read as a video ({reason})") from error


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        raise VideoError("has no video stream")
    if stream.disposition & av.stream.Disposition.attached_pic:
        raise VideoError("has no video stream, only a cover picture")
    return stream


def _count_frames(path: Path) -> tuple[int, float]:
    """Packets of the best stream (the reference's frame count; headers lie) and its rate."""
    with av.open(str(path)) as container:
        stream = _video_stream(container)
        rate = stream.average_rate or stream.guessed_rate or 1
        return sum(1 for packet in container.demux(stream) if packet.size), float(rate)


def _decode(path: Path) -> Iterator[av.VideoFrame | None]:
    """Every frame in the order of display; None for a packet that is damaged."""
    with av.open(str(path)) as container:
        stream = _video_stream(container)
        # Frame threads give different pictures on each reading of a damaged file.
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                yield None


class _RgbConverter:
    """Frames to upright uint8 [H, W, 3]; one for all frames of a video: it keeps its set-up."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        rgb = self._reformatter.reformat(frame, format="rgb24").to_ndarray()
        quarter_turns = round(frame.rotation) % 360 // 90
        return np.ascontiguousarray(np.rot90(rgb, quarter_turns))


def _stated_duration(path: Path) -> float:
    with av.open(str(path)) as container:
        stream = _video_stream(container)
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / av.time_base


def _varies(times: list[float | None]) -> bool:
    gaps = np.diff(np.sort([time for time in times if time is not None]))
    if len(gaps) < 2:
        return False
    usual = np.median(gaps)
    return bool((np.abs(gaps - usual) > usual / 4).mean() > 1 / 20)
