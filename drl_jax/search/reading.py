"""Reads video files for an index, in worker processes: no jax in here."""

import dataclasses
import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from drl_jax.data.video import VideoError, read_timed_frames

# Side of the thumbnails, pixels.
THUMBNAIL = 112


@dataclasses.dataclass(frozen=True)
class VideoRead:
    """A file as it was read.

    Attributes:
      sha256: of its content; empty if it cannot be opened.
      error: why it gives no frames; empty if it does.
      frames: uint8 [F, S, S, 3]; None with an error, and for a file whose content was known.
      times: F seconds.
      thumbnails: JPEG file with the frames side by side.
    """

    sha256: str
    error: str = ""
    frames: np.ndarray | None = None
    times: tuple[float, ...] = ()
    thumbnails: bytes = b""


def read_video(path: Path, known_sha256: str, max_frames: int, size: int) -> VideoRead:
    """Reads a file; decodes it unless its content is known.

    Args:
      path: of the file.
      known_sha256: of its content when it was last read; empty if it was not.
      max_frames: see `drl_jax.data.video.sample_positions`.
      size: side of the frames, pixels.
    """
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return VideoRead("", f"cannot be opened ({error.strerror})")
    if sha256 == known_sha256:
        return VideoRead(sha256)
    try:
        frames, times = read_timed_frames(path, max_frames, size)
    except VideoError as error:
        return VideoRead(sha256, str(error))
    return VideoRead(sha256, "", frames, tuple(map(float, times)), _strip(frames))


def _strip(frames: np.ndarray) -> bytes:
    """Frames side by side as a JPEG file."""
    side = min(THUMBNAIL, frames.shape[1])
    small = [np.asarray(Image.fromarray(frame).resize((side, side))) for frame in frames]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(small, axis=1)).save(file, "JPEG", quality=85)
    return file.getvalue()
