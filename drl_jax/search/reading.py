"""Finds video files and reads them: as windows for an index, or whole.

Worker processes import this module, so it does not import jax.
"""

import contextlib
import dataclasses
import io
import os
import re
import socket
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from drl_jax.data.frame_form import FrameForm
from drl_jax.data.long_video import sample_video
from drl_jax.data.pictures import to_form, to_rgb
from drl_jax.data.video import sampled_frames
from drl_jax.data.video_file import (
    VIDEO_SUFFIXES,
    OpenVideo,
    VideoError,
    ffmpeg_errors,
    open_video,
)
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.files import names_below, sha256
from drl_jax.runtime.resources import memory_limit
from drl_jax.runtime.worker_pool import CallPool, WorkerFailure
from drl_jax.search import STRIP_FRAMES
from drl_jax.search.windows import SHORT_VIDEO_SECONDS, Window, windows_of

# How a byte of a name that is not UTF-8 is written.
_ESCAPED = re.compile(rb"\\x([89a-f][0-9a-f])")
_THUMBNAIL = 112  # Side, pixels.
# What `picture_hash` looks at: cosines of the 8 lowest frequencies on a grid of so many places.
_PLACES = 32
_COSINES = np.cos(np.pi / _PLACES * np.outer(np.arange(8), np.arange(_PLACES) + 0.5))
# The bits of odd frequencies along its rows, in which the hash of a mirrored picture differs.
MIRRORED = np.uint64(0x5555_5555_5555_5555)
# Standard deviation of grey below which a picture is plain, levels; and what a frequency has at
# least, 1/8 of a level: a symmetrical picture has no odd ones, and their signs would be chance.
_PLAIN, _NOISE = 4.0, 32.0
# Of cameras, screenshots and web pages. Pillow's other decoders get little scrutiny, and one starts
# another program.
_FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "AVIF")
# Largest picture that is decoded, pixels; JPEG is scaled while it is decoded.
_MAX_PIXELS = 50_000_000
# Bytes that decoding a picture, and a video from elsewhere, may take; seconds of a picture.
_MEMORY, _SENT_MEMORY, _SECONDS = 2**30, 2 * 2**30, 10.0


class FoundFile(NamedTuple):
    """A video file of a folder; `allowed` are the seconds that decoding may take."""

    path: str
    size: int
    mtime_ns: int
    allowed: float


def find_videos(
    folder: Path, timeout: float, unusable: dict[str, str], refused: dict[str, str] | None = None
) -> Iterator[FoundFile]:
    """Yields the video files below a folder; adds to `unusable` why other names are none.

    Adds to `refused` why folders below may not be listed, which is raised without it.
    """
    others: dict[str, OSError | None] = {}
    names = names_below(folder, others)
    for name, error in others.items():
        if error is not None:
            if refused is None:
                raise error
            refused[path_of(name)] = f"it cannot be listed: {error.strerror}"
        elif _is_video(name):
            unusable[path_of(name)] = "it is no file, e.g. a link to nothing"
    for name in filter(_is_video, names):
        path = path_of(name)
        if path != name and file_of(folder, path) != folder / name:
            unusable[path] = "its name is not UTF-8, and that of another file when it is escaped"
        elif (file := _found_file(folder, path, timeout)) is not None:
            yield file


def path_of(name: str | Path) -> str:
    r"""The path of a file in an index: a byte of the name that is not UTF-8 becomes \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def file_of(folder: Path, path: str) -> Path:
    """The file with a path of an index, of which it may be that `path_of` has changed it."""
    file = folder / path
    if "\\x" not in path or file.exists():
        return file
    name = _ESCAPED.sub(lambda byte: bytes.fromhex(byte[1].decode()), path.encode())
    return folder / os.fsdecode(name)


def find_named(folder: Path, path: str, timeout: float) -> FoundFile | None:
    """The video file of `--only`, or None; UserError if `find_videos` cannot yield the path."""
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        raise UserError(f"a path below {folder} is needed, not {path}")
    path = path_of(path)
    # A folder is listed by its own path only.
    file, root = file_of(folder, path), folder.resolve()
    parent = file.parent.resolve()
    if parent.is_relative_to(root) and parent.relative_to(root) != file.relative_to(folder).parent:
        raise UserError(f"{file} leads through a link: name {parent.relative_to(root) / file.name}")
    return _found_file(folder, path, timeout) if _is_video(path) and file.is_file() else None


def _found_file(folder: Path, path: str, timeout: float) -> FoundFile | None:
    """A file, or None: it is gone since it was listed."""
    with contextlib.suppress(FileNotFoundError):
        status = file_of(folder, path).stat()
        allowed = allowed_seconds(timeout, status.st_size)
        return FoundFile(path, status.st_size, status.st_mtime_ns, allowed)
    return None


def allowed_seconds(timeout: float, size: int) -> float:
    """Seconds that decoding a file may take: `timeout`, and one for each MB."""
    return timeout + size / 1e6


def _is_video(path: str) -> bool:
    stem, _, suffix = path.rpartition("/")[2].rpartition(".")
    return bool(stem) and f".{suffix.lower()}" in VIDEO_SUFFIXES


@dataclasses.dataclass(frozen=True)
class VideoRead:
    """A file that was read: fields of its `VideoRecord`, with the arrays that need no model."""

    sha256: str = ""
    error: str = ""
    is_known: bool = False  # Nothing was decoded.
    duration: float = 0.0
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    frames: np.ndarray | None = None  # uint8 [F, S, S, 3], of a short video.
    spooled: Path | None = None  # File with those of a long one, which the caller deletes.

    @property
    def windows(self) -> list[tuple[int, ...]]:
        rows = self.arrays.get("window.frames", ())
        return [tuple(row[row >= 0].tolist()) for row in rows]


class FrameSampling(NamedTuple):
    """What is sampled: `max_frames` of a window, `fps` a second of a file of several windows."""

    form: FrameForm
    max_frames: int
    fps: float = 1.0
    clock: str = "time"


def read_video(
    path: Path, known_sha256s: Collection[str], sampling: FrameSampling, spool: Path
) -> VideoRead:
    """Reads a file, and decodes it unless its content is known.

    A video of at most `SHORT_VIDEO_SECONDS` is one window, with the frames of a training example.
    The frames of a longer one are written to `spool`: memory does not depend on its length. Raises
    Unavailable if the file cannot be read, or `spool` cannot be written.
    """
    with ffmpeg_errors(path):
        digest = sha256(path)
    if digest in known_sha256s:
        return VideoRead(digest, is_known=True)
    try:
        with open_video(path, sampling.form.as_shown) as video:
            if video.duration <= SHORT_VIDEO_SECONDS:
                read = _read_short(video, sampling)
            else:
                read = _read_long(video, sampling, spool)
    except VideoError as error:
        spool.unlink(missing_ok=True)
        return VideoRead(digest, str(error))
    arrays = {**read.arrays, **_picture_arrays(frames_of(read, sampling.form))}
    return dataclasses.replace(read, sha256=digest, arrays=arrays)


def read_sent_video(*arguments: Any) -> VideoRead:
    """`read_video` of a file from elsewhere, of which a small one can have the largest pictures."""
    with memory_limit(_SENT_MEMORY):
        return read_video(*arguments)


def read_video_on_node(*arguments: Any) -> VideoRead | WorkerFailure:
    """`read_video` on a cluster: what the operating system refuses names the node."""
    try:
        return read_video(*arguments)
    except Unavailable as error:
        return WorkerFailure(f"{error} (on node {socket.gethostname()})", is_passing=True)


def read_whole_video(path: Path, sampling: FrameSampling) -> VideoRead:
    """Reads a file as one window, with the frames of evaluation; Unavailable if it cannot."""
    try:
        with open_video(path, sampling.form.as_shown) as video:
            return _read_short(video, sampling)
    except VideoError as error:
        return VideoRead(error=str(error))


def frames_of(read: VideoRead, form: FrameForm) -> np.ndarray:
    """The frames of a video that was read, uint8 [F, S, S, 3]; those of a long one are mapped."""
    if read.frames is not None:
        return read.frames
    shape = (len(read.arrays["frame.time"]), *form.shape)
    return np.memmap(read.spooled, np.uint8, "r", shape=shape)


def picture_hash(frame: np.ndarray) -> np.uint64:
    """A hash of what uint8 [S, S, 3] shows: the signs of its 8 x 8 lowest frequencies.

    Pictures that are scaled or compressed have hashes of which few bits differ; 0 is a plain one.
    """
    grey = Image.fromarray(frame).convert("L").resize((_PLACES, _PLACES), Image.Resampling.BOX)
    levels = np.asarray(grey, np.float32)
    if levels.std() < _PLAIN:
        return np.uint64(0)
    bits = _COSINES @ levels @ _COSINES.T > _NOISE
    return np.packbits(bits).view(">u8")[0].astype(np.uint64)


def _picture_arrays(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Hashes of frames, uint8 [F, S, S, 3], and strips of their thumbnails."""
    side = min(_THUMBNAIL, frames.shape[1])
    hashes, strips = [], []
    for first in range(0, len(frames), STRIP_FRAMES):
        batch = frames[first : first + STRIP_FRAMES]
        hashes += map(picture_hash, batch)
        thumbnails = [Image.fromarray(frame).resize((side, side)) for frame in batch]
        file = io.BytesIO()
        Image.fromarray(np.concatenate(thumbnails, axis=1)).save(file, "JPEG", quality=85)
        strips.append(file.getvalue())
    return {"frame.hash": np.array(hashes, np.uint64), **strip_arrays(strips)}


def strip_arrays(strips: Sequence[bytes]) -> dict[str, np.ndarray]:
    """What an index stores of strips of thumbnails, JPEG files (`VideoRecord.strip`)."""
    return {
        "strip.end": np.cumsum([len(strip) for strip in strips], dtype=np.int64),
        "strip.crc32": np.fromiter(map(zlib.crc32, strips), np.uint32),
        "byte.strip": np.frombuffer(b"".join(strips), np.uint8),
    }


def _read_short(video: OpenVideo, sampling: FrameSampling) -> VideoRead:
    """Reads a video as one window."""
    frames, times = sampled_frames(video, sampling.max_frames, sampling.form, None, sampling.clock)
    window = Window(0.0, max(video.duration, float(times[-1])), tuple(range(len(frames))))
    arrays = _arrays([window], times, sampling.max_frames)
    return VideoRead(duration=window.end, arrays=arrays, frames=frames)


def _read_long(video: OpenVideo, sampling: FrameSampling, spool: Path) -> VideoRead:
    def emit(frame: np.ndarray) -> None:
        try:
            file.write(frame.tobytes())
        except OSError as error:  # Otherwise it would be taken for one of the video.
            raise Unavailable(spool, error, "written") from error

    try:
        with spool.open("wb") as file:
            sampled = sample_video(video, sampling.form, emit, sampling.fps)
    except OSError as error:
        raise Unavailable(spool, error, "written") from error
    windows = windows_of(sampled, sampling.max_frames)
    arrays = _arrays(windows, sampled.times, sampling.max_frames)
    return VideoRead(duration=sampled.duration, arrays=arrays, spooled=spool)


def _arrays(windows: Sequence[Window], times: np.ndarray, max_frames: int) -> dict[str, np.ndarray]:
    numbers = np.full((len(windows), max_frames), -1, np.int32)
    for row, window in zip(numbers, windows, strict=True):
        row[: len(window.frames)] = window.frames
    return {
        "window.span": np.array([window[:2] for window in windows], np.float64),
        "window.frames": numbers,
        "frame.time": np.asarray(times, np.float64),
    }


def open_picture(pool: CallPool, path: Path, form: FrameForm, name: str = "") -> bytes:
    """Decodes an image file, or its first picture, in a process: the bytes of uint8 [S, S, 3].

    It is upright, and white where it is transparent; a UserError begins with `name`, or the path.
    """
    decoded = pool.call(_decode, path, form, timeout=_SECONDS)
    if isinstance(decoded, WorkerFailure):
        decoded = f"cannot be decoded ({decoded.reason})"
    if isinstance(decoded, str):
        raise UserError(f"{name or path} {decoded}")
    return decoded


def _decode(path: Path, form: FrameForm) -> bytes | str:
    """The frame, or what is wrong with the file."""
    # Pillow's own limit refuses pictures that are scaled here, and it warns of damaged metadata.
    Image.MAX_IMAGE_PIXELS = None
    warnings.simplefilter("ignore")
    try:
        with memory_limit(_MEMORY), Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS:
                factor = next((n for n in (2, 4) if width * height <= n * n * _MAX_PIXELS), 8)
                image.draft(None, (max(1, width // factor), max(1, height // factor)))
            if image.width * image.height > _MAX_PIXELS:
                return f"has {width} x {height} pixels; at most {_MAX_PIXELS:,} are decoded"
            image.load()
            return to_form(np.asarray(to_rgb(image)), form).tobytes()
    except UnidentifiedImageError:
        return f"is not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file; convert it to one"
    except VideoError as error:
        return f"cannot be used: {error}"
    # Pillow raises many types of errors for damaged files; those of the system have a number.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            return f"cannot be read: {error.strerror}"
        return "is damaged, or too large"  # Decoders do not say whether memory was missing.
