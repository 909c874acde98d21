"""Decodes many videos with all cores."""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.processes import map_in_processes
from drl_jax.video import VideoError, read_frames

_JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A video's frames in stored form, or why there are none.

    Attributes:
      frames: uint8 [F, S, S, 3] for `raw`, a list of F JPEG files for `jpeg`; None if unreadable.
      error: empty if readable.
    """

    frames: np.ndarray | list[bytes] | None
    error: str = ""


def decode_videos(
    paths: Sequence[Path], max_frames: int, image_size: int, storage: str
) -> Iterator[Decoded]:
    """Decodes videos with all cores.

    Args:
      paths: video files.
      max_frames: see `drl_jax.video.sample_positions`.
      image_size: side of the frames, pixels.
      storage: "jpeg" or "raw".

    Yields:
      One Decoded for each path, in order. A file that cannot be read is a value, not an exception.
    """
    return map_in_processes(_decode, [(path, max_frames, image_size, storage) for path in paths])


def _decode(path: Path, max_frames: int, image_size: int, storage: str) -> Decoded:
    try:
        frames = read_frames(path, max_frames, image_size)
    except VideoError as error:
        return Decoded(None, str(error))
    return Decoded(frames if storage == "raw" else [_encode_jpeg(frame) for frame in frames])


def _encode_jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    # 4:4:4: halved chroma costs more than the quality step from 95 to 90.
    Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")
    return file.getvalue()
