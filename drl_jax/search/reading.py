"""Reads video files for an index.

Worker processes import this module, so it does not import jax.
"""

import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image

from drl_jax.data.frame_form import FrameForm
from drl_jax.data.video import VideoError, read_timed_frames
from drl_jax.runtime.files import sha256

# Side of the thumbnails, pixels.
THUMBNAIL = 112


@dataclasses.dataclass(frozen=True)
class VideoRead:
    """A file that was read.

    Attributes:
      sha256: of its content; empty if it cannot be opened.
      error: why it has no frames; empty if it has.
      frames: uint8 [F, S, S, 3]; None with an error, or if the content was known.
      times: F times, seconds from the start.
      thumbnails: JPEG file with the frames side by side.
    """

    sha256: str
    error: str = ""
    frames: np.ndarray | None = None
    times: tuple[float, ...] = ()
    thumbnails: bytes = b""


def read_video(path: Path, known_sha256: str, max_frames: int, form: FrameForm) -> VideoRead:
    """Reads a file, and decodes it unless its content is known.

    Args:
      path: of the file.
      known_sha256: of its content when it was last read; empty if it was not read before.
      max_frames: see `drl_jax.data.video.sample_positions`.
      form: form of the frames.
    """
    try:
        digest = sha256(path)
    except OSError as error:
        return VideoRead("", f"cannot be opened ({error.strerror})")
    if digest == known_sha256:
        return VideoRead(digest)
    try:
        frames, times = read_timed_frames(path, max_frames, form)
    except VideoError as error:
        return VideoRead(digest, str(error))
    return VideoRead(digest, "", frames, tuple(map(float, times)), _strip(frames))


def _strip(frames: np.ndarray) -> bytes:
    """Returns a JPEG file with the frames side by side."""
    side = min(THUMBNAIL, frames.shape[1])
    small = [np.asarray(Image.fromarray(frame).resize((side, side))) for frame in frames]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(small, axis=1)).save(file, "JPEG", quality=85)
    return file.getvalue()
