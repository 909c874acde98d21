"""Decodes, samples and resizes the frames of video files.

Decoding workers import this module, so it does not import jax.

With the default form of frames, the result is bit for bit that of the reference (decord, PIL,
torchvision's crop) wherever decord decodes correctly: one sequential pass in one thread, frames
counted as decoded, swscale's default flags. It never seeks: seeking returns wrong frames in files
with edit lists or B-frames in AVI.
"""

import codecs
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from drl_jax.data.frame_form import FrameForm
from drl_jax.runtime.errors import Unavailable, refusal

# Suffixes of video files, lower case.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv"),
    *(".flv", ".f4v", ".mpg", ".mpeg", ".mpe", ".3gp", ".3g2", ".ogv", ".gif"),
    *(".mts", ".m2ts", ".ts", ".qt", ".asf", ".vob"),
)
# FFmpeg's demuxers of files with these suffixes, also of raw streams (mpegvideo, m4v) and of FLV
# that nginx records (live_flv). None of them opens what a file names; concat, hls and others do.
_DEMUXERS = (
    *("mov", "avi", "matroska", "asf", "flv", "live_flv", "mpeg", "mpegvideo", "mpegts", "m4v"),
    *("ogg", "gif"),
)
_CONTAINER_OPTIONS = {"format_whitelist": ",".join(_DEMUXERS), "protocol_whitelist": "none"}
# Start and end of a part of a video, seconds.
Span = tuple[float, float]
# PIL's filters; they average over all pixels that become one.
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Above this aspect ratio, the picture resized by its short side would not fit in memory.
_MAX_ASPECT_RATIO = 64
# Black in limited-range video decodes to a few levels above 0.
_BLACK_LEVEL = 8
# Titles in Latin-1 are common, and PyAV below 19 raises an error for them by default.
_LENIENT = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


class Openable(Protocol):
    """A video inside another file; the suffix of the opened file's `name`, if any, is its own."""

    def open(self, mode: str = "rb") -> BinaryIO: ...


VideoFile = Path | Openable


class VideoError(ValueError):
    """No frames can be read from a file; the message gives the reason, without the path."""


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
    positions = range(first, last + 1, max(1, round(fps)))
    if len(positions) <= max_frames:
        return list(positions)
    return [positions[i] for i in np.linspace(0, len(positions) - 1, num=max_frames, dtype=int)]


def to_form(image: np.ndarray, form: FrameForm) -> np.ndarray:
    """Resizes a picture to a square.

    Args:
      image: uint8 [H, W, 3].
      form: size, resize and interpolation.

    Returns:
      uint8 [size, size, 3].

    Raises:
      VideoError: the aspect ratio is too large.
    """
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    # Also where nothing is cropped, so that a dataset has the same videos in every form.
    if long > _MAX_ASPECT_RATIO * short:
        raise VideoError(f"picture of {width} x {height} pixels is too thin to resize")
    size, resampling = form.size, _RESAMPLING[form.interpolation]
    if form.resize == "squash":
        return np.asarray(Image.fromarray(image).resize((size, size), resampling))
    # As in torchvision: the long side is truncated, the offset of the crop rounded half to even.
    scaled = int(size * long / short)
    new_width, new_height = (size, scaled) if width <= height else (scaled, size)
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    resized = Image.fromarray(image).resize((new_width, new_height), resampling)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def read_frames(
    path: VideoFile, max_frames: int, form: FrameForm, span: Span | None = None
) -> np.ndarray:
    """Like `read_timed_frames`, without the times: uint8 [F, size, size, 3]."""
    return read_timed_frames(path, max_frames, form, span)[0]


def read_timed_frames(
    path: VideoFile, max_frames: int, form: FrameForm, span: Span | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes the sampled frames of a video.

    Damaged packets are skipped; a truncated file gives the frames before its end.

    Args:
      path: any file that FFmpeg reads.
      max_frames: see `sample_positions`.
      form: form of the frames.
      span: only sample this part of the video.

    Returns:
      Frames uint8 [F, size, size, 3], 1 <= F <= max_frames, and their presentation times float64
      [F], seconds from the first frame of the file.

    Raises:
      VideoError: no frame could be decoded.
      Unavailable: the file cannot be read.
    """
    with ffmpeg_errors(path):
        n_frames, fps = count_frames(path)
        positions = sample_positions(n_frames, fps, max_frames, span)
        if n_frames and not positions:
            raise VideoError(
                f"its span {span[0]:g}-{span[1]:g} s is outside the file ({n_frames / fps:.1f} s)"
            )
        wanted, sampled, times = set(positions), [], []
        to_rgb, first = RgbConverter(), None
        with contextlib.closing(decode(path)) as decoded:
            frames = (frame for frame in decoded if frame is not None)
            for position, frame in enumerate(frames):
                # Without timestamps, assume a constant frame rate.
                time = position / fps if frame.time is None else frame.time
                first = time if first is None else first
                if position in wanted:
                    sampled.append(to_form(to_rgb(frame), form))
                    times.append(time - first)
                if position >= positions[-1]:
                    break
    return _stacked(sampled), np.array(times)


def video_length(path: VideoFile) -> float:
    """Length of a file by its number of frames and its frame rate, seconds.

    Raises:
      VideoError: it is not a video.
      Unavailable: it cannot be read.
    """
    with ffmpeg_errors(path):
        n_frames, fps = count_frames(path)
    return n_frames / fps


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """Result of decoding a file completely.

    Attributes:
      frames: number of decoded frames.
      damaged_packets: number of packets that could not be decoded.
      fps: average frame rate.
      duration: duration in the file's header, seconds; 0 if it has none.
      variable_rate: whether the durations of more than 5% of the frames differ from the median.
      black: whether all sampled frames are black.
    """

    frames: int
    damaged_packets: int
    fps: float
    duration: float
    variable_rate: bool
    black: bool


def inspect_video(path: VideoFile, max_frames: int, form: FrameForm) -> VideoFacts:
    """Decodes a file completely.

    Args:
      path: any file that FFmpeg reads.
      max_frames: see `sample_positions`.
      form: form of the frames.

    Raises:
      VideoError, Unavailable: as in `read_frames`.
    """
    with ffmpeg_errors(path):
        n_frames, fps = count_frames(path)
        wanted, sampled = set(sample_positions(n_frames, fps, max_frames)), []
        to_rgb, times, frames, damaged = RgbConverter(), [], 0, 0
        for frame in decode(path):
            if frame is None:
                damaged += 1
                continue
            if frames in wanted:
                sampled.append(to_form(to_rgb(frame), form))
            frames += 1
            times.append(frame.time)
        duration = _header_duration(path)
    black = bool(_stacked(sampled).max() <= _BLACK_LEVEL)
    return VideoFacts(frames, damaged, fps, duration, _is_variable(times), black)


def _stacked(frames: list[np.ndarray]) -> np.ndarray:
    if not frames:
        raise VideoError("no frame could be decoded")
    return np.stack(frames)


@contextlib.contextmanager
def ffmpeg_errors(path: VideoFile) -> Iterator[None]:
    """Converts FFmpeg's errors, and those of impossible values in a file, to VideoError.

    Errors of the operating system, which say nothing about the content, become Unavailable.
    """
    try:
        yield
    except VideoError:
        raise
    # First: some are also errors of the operating system, e.g. EIO where a file is cut.
    except (av.error.FFmpegError, ValueError, ArithmeticError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"cannot be read as a video ({' '.join(reason.split())})") from error
    except (OSError, MemoryError) as error:
        found = error if isinstance(error, OSError) else refusal(error)
        raise Unavailable(getattr(path, "path", path), found) from error


class _Source:
    """A file as FFmpeg sees it, which would take an error of reading for the end."""

    def __init__(self, file: BinaryIO):
        self.name = f"video{Path(str(getattr(file, 'name', ''))).suffix}"
        self.tell, self._file = file.tell, file
        self.error: OSError | None = None

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self.error = error
            return b""

    def seek(self, offset: int, whence: int) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):  # A damaged file may name a place before its start.
            return -1


@contextlib.contextmanager
def open_container(path: VideoFile) -> Iterator[av.container.InputContainer]:
    """Opens a video with PyAV, also one whose titles are not UTF-8.

    FFmpeg gets the bytes and no name, which it could take for an address, and opens nothing else.

    Raises:
      VideoError: it is not a video.
      OSError: it cannot be opened or, also at the end of the context, read.
    """
    with path.open("rb") as file:
        source = _Source(file)
        try:
            try:
                container = av.open(source, container_options=_CONTAINER_OPTIONS, **_LENIENT)
            except av.error.FFmpegError as error:
                if text := _start_of_text(file):
                    reason = f"its content is text that starts with {text!r}"
                elif isinstance(error, av.error.ArgumentError):
                    reason = f"its format is none of {', '.join(_DEMUXERS)}"
                else:
                    raise
                raise VideoError(f"is not a video: {reason}") from error
            with container:
                yield container
        finally:
            if source.error is not None:
                raise source.error


def _start_of_text(file: BinaryIO) -> str:
    """The first words of a file of text, e.g. of a web page; empty for any other file."""
    file.seek(0)
    try:
        # A character may be cut.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(file.read(60))
    except UnicodeDecodeError:
        return ""
    text = " ".join(text.split())
    return text if text.isprintable() else ""


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        raise VideoError("has no video stream")
    if stream.disposition & av.stream.Disposition.attached_pic:
        raise VideoError("has no video stream, only a cover picture")
    if stream.codec_context is None:
        raise VideoError("has a video codec that FFmpeg cannot decode")
    return stream


def count_frames(path: VideoFile) -> tuple[int, float]:
    """Number of packets of the best stream, and its frame rate.

    The reference counts frames in the same way; the counts in headers are unreliable.
    """
    with open_container(path) as container:
        stream = _video_stream(container)
        rate = stream.average_rate or stream.guessed_rate or 1
        return sum(1 for packet in container.demux(stream) if packet.size), float(rate)


def decode(path: VideoFile) -> Iterator[av.VideoFrame | None]:
    """Yields all frames in display order, and None for each damaged packet."""
    with open_container(path) as container:
        stream = _video_stream(container)
        # With frame threads, the decoded frames of a damaged file differ from run to run.
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                yield None


class RgbConverter:
    """Converts frames to upright uint8 [H, W, 3]; reusing one for a whole video is faster."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        rgb = self._reformatter.reformat(frame, format="rgb24").to_ndarray()
        quarter_turns = round(frame.rotation) % 360 // 90
        return np.ascontiguousarray(np.rot90(rgb, quarter_turns))


def _header_duration(path: VideoFile) -> float:
    with open_container(path) as container:
        stream = _video_stream(container)
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / av.time_base


def _is_variable(times: list[float | None]) -> bool:
    gaps = np.diff(np.sort([time for time in times if time is not None]))
    if len(gaps) < 2:
        return False
    median = np.median(gaps)
    return bool((np.abs(gaps - median) > median / 4).mean() > 1 / 20)
