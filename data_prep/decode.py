"""Decodes videos in parallel. Worker processes import this module, so its imports are light."""

import contextlib
import dataclasses
import errno
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.frame_cache import FrameCache, Frames, read_entry, write_entry
from data_prep.locations import Clip, Location, absolute
from drl_jax.data.storage import StorageSpec
from drl_jax.data.video import Span, VideoError, read_frames
from drl_jax.runtime.errors import one_line
from drl_jax.runtime.worker_pool import OrderedMap, WorkerFailure, map_in_processes

_JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Encoded frames of a video, or the reason why it could not be decoded.

    Attributes:
      frames: uint8 [F, S, S, 3] for `raw`, a list of F JPEG files for `jpeg`; None on failure.
      error: the reason; empty on success.
      is_passing: whether the error is no property of the video: another try may succeed.
    """

    frames: Frames | None
    error: str = ""
    is_passing: bool = False


def decode_clips(
    clips: Sequence[Clip],
    *,
    cache: FrameCache,
    timeout: float,
    map_calls: OrderedMap = map_in_processes,
) -> Iterator[Decoded]:
    """Decodes videos, except those that the cache has.

    Args:
      clips: the videos.
      cache: cache of decoded frames; it sets the storage variant.
      timeout: maximum seconds per video.
      map_calls: runs the decoders: on this machine, or on a cluster that shares the cache.

    Yields:
      One Decoded for each clip, in order. A file that cannot be read gives a Decoded with an error,
      not an exception.

    Raises:
      OSError: the cache cannot be written, e.g. because the disk is full, or an entry that was
        written cannot be read here.
    """
    entries: list[Path | OSError] = []
    for clip in clips:
        try:
            entries.append(cache.entry(clip))
        except OSError as error:
            entries.append(error)
    # Absolute: the nodes of a cluster have other working directories.
    calls = [
        (absolute(clip.location), clip.span, entry.absolute(), cache.storage)
        for clip, entry in zip(clips, entries, strict=True)
        if isinstance(entry, Path)
    ]
    with contextlib.closing(map_calls(_ensure_entry, calls, timeout=timeout)) as errors:
        for entry in entries:
            if isinstance(entry, OSError):
                yield Decoded(None, one_line(entry), is_passing=True)
                continue
            error = next(errors)
            if isinstance(error, WorkerFailure):
                yield Decoded(None, error.reason, is_passing=error.is_passing)
            elif isinstance(error, OSError):
                raise error
            elif error:
                yield Decoded(None, error)
            else:
                frames = read_entry(entry)
                if frames is None:
                    raise OSError(errno.EIO, "the entry was written and cannot be read", str(entry))
                yield Decoded(frames)


def _ensure_entry(
    location: Location, span: Span | None, entry: Path, storage: StorageSpec
) -> str | OSError:
    """Decodes a video into the cache unless it is there.

    Returns:
      "" on success, what is wrong with the file, or why the cache cannot be read or written.
    """
    try:
        if read_entry(entry) is not None:
            return ""
    except OSError as error:
        return error
    frames = read_frames_or_error(location, storage, span)
    if isinstance(frames, str):
        return frames
    if storage.encoding == "jpeg":
        frames = [encode_jpeg(frame) for frame in frames]
    try:
        write_entry(entry, frames)
    except OSError as error:
        # Returned: an exception would be taken for one of this file.
        return error
    return ""


def read_frames_or_error(
    location: Location, storage: StorageSpec, span: Span | None
) -> np.ndarray | str:
    """Decodes a video's sampled frames.

    Args:
      location: of the video.
      storage: form and maximum number of the frames.
      span: start and end in seconds; None: the whole file.

    Returns:
      uint8 [F, S, S, 3], or the reason why the file cannot be decoded.

    Raises:
      Unavailable: the file cannot be read.
    """
    try:
        return read_frames(location, storage.max_frames, storage.form, span)
    except VideoError as error:
        return str(error)


def encode_jpeg(frame: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 3] as a JPEG file of quality 95."""
    file = io.BytesIO()
    # 4:4:4: chroma subsampling loses more than the step from quality 95 to 90.
    Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")
    return file.getvalue()
