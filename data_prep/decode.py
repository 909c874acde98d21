"""Decodes many videos with all cores, each only once."""

import dataclasses
import errno
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.frame_cache import FrameCache, Frames, read_entry, write_entry
from data_prep.video_folder import Clip
from drl_jax.data.video import Span, VideoError, read_frames
from drl_jax.runtime.worker_pool import Lost, map_in_processes

_JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A video's frames in stored form, or why there are none.

    Attributes:
      frames: uint8 [F, S, S, 3] for `raw`, a list of F JPEG files for `jpeg`; None if unreadable.
      error: empty if readable.
    """

    frames: Frames | None
    error: str = ""


def decode_clips(
    clips: Sequence[Clip],
    *,
    cache: FrameCache,
    max_frames: int,
    image_size: int,
    storage: str,
    timeout: float,
) -> Iterator[Decoded]:
    """Decodes videos with all cores, except those that the cache has.

    Args:
      clips: the videos.
      cache: where decoded frames are kept.
      max_frames: see `drl_jax.data.video.sample_positions`.
      image_size: side of the frames, pixels.
      storage: "jpeg" or "raw".
      timeout: seconds that a video may take.

    Yields:
      One Decoded for each clip, in order. A file that cannot be read is a value, not an exception.

    Raises:
      OSError: the disk is full.
    """
    entries: list[Path | None] = []
    for clip in clips:
        try:
            entries.append(cache.entry(clip))
        except OSError:
            entries.append(None)
    calls = [
        (clip.path, clip.span, entry, max_frames, image_size, storage)
        for clip, entry in zip(clips, entries, strict=True)
        if entry is not None
    ]
    errors = map_in_processes(_ensure_entry, calls, timeout=timeout)
    for entry in entries:
        if entry is None:
            yield Decoded(None, "cannot be opened")
            continue
        error = next(errors)
        if isinstance(error, Lost):
            yield Decoded(None, error.reason)
        elif error == _DISK_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache.directory))
        elif error:
            yield Decoded(None, error)
        else:
            yield Decoded(read_entry(entry))


_DISK_FULL = "disk full"


def _ensure_entry(
    path: Path, span: Span | None, entry: Path, max_frames: int, image_size: int, storage: str
) -> str:
    """Decodes a video into the cache unless it is there; returns why it cannot, or ""."""
    if read_entry(entry) is not None:
        return ""
    try:
        frames = read_frames(path, max_frames, image_size, span)
    except VideoError as error:
        return str(error)
    try:
        write_entry(entry, frames if storage == "raw" else [encode_jpeg(f) for f in frames])
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _DISK_FULL
        raise
    return ""


def encode_jpeg(frame: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> a JPEG file of quality 95."""
    file = io.BytesIO()
    # 4:4:4: halved chroma costs more than the quality step from 95 to 90.
    Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")
    return file.getvalue()
