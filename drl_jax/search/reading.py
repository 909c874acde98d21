"""Reads video files: as windows for an index, or whole.

Worker processes import this module, so it does not import jax.
"""

import contextlib
import dataclasses
import errno
import io
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drl_jax.data.frame_form import FrameForm
from drl_jax.data.long_video import sample_video
from drl_jax.data.video import VideoError, ffmpeg_errors, read_timed_frames, video_length
from drl_jax.runtime.files import sha256
from drl_jax.runtime.resources import memory_limit
from drl_jax.search.windows import SHORT_VIDEO_SECONDS, Window, windows_of

# Side of the thumbnails, pixels.
THUMBNAIL = 112
# Frames side by side in a JPEG file.
STRIP_FRAMES = 64
# Bytes that decoding a file from elsewhere may take.
_SENT_MEMORY = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class VideoRead:
    """A file that was read.

    Attributes:
      sha256: of its content; empty if it was not computed.
      error: why it has no frames; empty if it has.
      failure: why nothing can be stored, which is no property of the video; empty if it can.
      timed_out: whether `error` is that decoding took too long.
      is_passing: whether `error` is no property of the video, and must not be stored.
      is_known: whether the content was known; nothing was decoded then.
      times: F times of its frames, seconds from the start.
      duration: seconds.
      windows: its parts.
      strips: JPEG files of thumbnails, STRIP_FRAMES side by side; none of a video read whole.
      frames: uint8 [F, S, S, 3] of a short video; None if they are in `spooled`.
      spooled: file with the bytes of the frames, which the caller deletes.
    """

    sha256: str
    error: str = ""
    failure: str = ""
    timed_out: bool = False
    is_passing: bool = False
    is_known: bool = False
    times: tuple[float, ...] = ()
    duration: float = 0.0
    windows: tuple[Window, ...] = ()
    strips: tuple[bytes, ...] = ()
    frames: np.ndarray | None = None
    spooled: Path | None = None


def read_video(
    path: Path, known_sha256s: Collection[str], max_frames: int, form: FrameForm, spool: Path
) -> VideoRead:
    """Reads a file, and decodes it unless its content is known.

    A video of at most `SHORT_VIDEO_SECONDS` is one window, with the frames of a training example.

    Args:
      path: of the file.
      known_sha256s: of contents that need not be decoded.
      max_frames: frames of a window.
      form: form of the frames.
      spool: file to write the frames of a long video to: memory does not depend on its length.

    Raises:
      Unavailable: the file cannot be read.
    """
    with ffmpeg_errors(path):
        digest = sha256(path)
    if digest in known_sha256s:
        return VideoRead(digest, is_known=True)
    try:
        length = video_length(path)
        if length <= SHORT_VIDEO_SECONDS:
            return _read_short(path, digest, max_frames, form, length)
        return _read_long(path, digest, max_frames, form, spool)
    except VideoError as error:
        spool.unlink(missing_ok=True)
        return VideoRead(digest, str(error))
    except SpoolError as error:
        return VideoRead(digest, failure=str(error))


def read_sent_video(*arguments: Any) -> VideoRead:
    """`read_video` of a file from elsewhere, of which a small one can have the largest pictures."""
    with memory_limit(_SENT_MEMORY):
        return read_video(*arguments)


def read_video_on_node(*arguments: Any) -> VideoRead | OSError:
    """`read_video` on a cluster, which adds the node to an OSError: what cannot be written is."""
    read = read_video(*arguments)
    return OSError(errno.EIO, read.failure) if read.failure else read


def read_whole_video(path: Path, max_frames: int, form: FrameForm) -> VideoRead:
    """Reads a file of any length as one window, with the frames that evaluation uses.

    Args:
      path: of the file.
      max_frames: frames of the window.
      form: form of the frames.

    Raises:
      Unavailable: the file cannot be read.
    """
    try:
        frames, times = read_timed_frames(path, max_frames, form)
    except VideoError as error:
        return VideoRead("", str(error))
    seconds = tuple(map(float, times))
    window = Window(0.0, seconds[-1], tuple(range(len(frames))))
    return VideoRead("", times=seconds, duration=window.end, windows=(window,), frames=frames)


def frames_of(read: VideoRead, form: FrameForm) -> np.ndarray:
    """The frames of a video that was read, uint8 [F, S, S, 3]; those of a long one are mapped."""
    if read.frames is not None:
        return read.frames
    return np.memmap(read.spooled, np.uint8, "r", shape=(len(read.times), *form.shape))


class SpoolError(Exception):
    """The frames of a long video cannot be written, e.g. because the disk is full."""


def _read_short(
    path: Path, digest: str, max_frames: int, form: FrameForm, length: float
) -> VideoRead:
    frames, times = read_timed_frames(path, max_frames, form)
    strips = _Strips()
    for frame in frames:
        strips.add(frame)
    window = Window(0.0, max(length, float(times[-1])), tuple(range(len(frames))))
    seconds = tuple(map(float, times))
    return VideoRead(
        digest,
        times=seconds,
        duration=window.end,
        windows=(window,),
        strips=strips.finish(),
        frames=frames,
    )


def _read_long(path: Path, digest: str, max_frames: int, form: FrameForm, spool: Path) -> VideoRead:
    strips = _Strips()
    with _spooling(spool) as write:

        def emit(frame: np.ndarray) -> None:
            write(frame.tobytes())
            strips.add(frame)

        video = sample_video(path, form, emit)
    return VideoRead(
        digest,
        times=tuple(map(float, video.times)),
        duration=video.duration,
        windows=tuple(windows_of(video, max_frames)),
        strips=strips.finish(),
        spooled=spool,
    )


@contextlib.contextmanager
def _spooling(path: Path) -> Iterator[Callable[[bytes], object]]:
    """Opens a file for writing; raises SpoolError if it cannot be written."""

    def write(content: bytes) -> None:
        try:
            file.write(content)
        except OSError as error:
            raise SpoolError(error.strerror) from error

    try:
        file = path.open("wb")
    except OSError as error:
        raise SpoolError(error.strerror) from error
    try:
        yield write
    finally:
        try:
            file.close()
        except OSError as error:
            raise SpoolError(error.strerror) from error


class _Strips:
    """Makes JPEG files of thumbnails side by side."""

    def __init__(self) -> None:
        self._pending: list[np.ndarray] = []
        self._done: list[bytes] = []

    def add(self, frame: np.ndarray) -> None:
        side = min(THUMBNAIL, len(frame))
        self._pending.append(np.asarray(Image.fromarray(frame).resize((side, side))))
        if len(self._pending) == STRIP_FRAMES:
            self._flush()

    def finish(self) -> tuple[bytes, ...]:
        if self._pending:
            self._flush()
        return tuple(self._done)

    def _flush(self) -> None:
        file = io.BytesIO()
        Image.fromarray(np.concatenate(self._pending, axis=1)).save(file, "JPEG", quality=85)
        self._done.append(file.getvalue())
        self._pending = []
