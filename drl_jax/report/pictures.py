"""Small pictures of frames as data URIs."""

import base64
import io

import numpy as np
from PIL import Image

# Side of a frame, pixels, and most frames of a filmstrip.
_SIDE, _STRIP_FRAMES = 96, 4


def shrink(frames: np.ndarray) -> np.ndarray:
    """uint8 [F, S, S, 3] -> the same with a side of at most 96 pixels."""
    side = min(_SIDE, frames.shape[1])
    size = (side, side)
    resized = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    return np.stack(resized)


def filmstrip(frames: np.ndarray) -> str:
    """Up to four evenly spaced frames side by side, a JPEG file as a data URI.

    Args:
      frames: uint8 [F, S, S, 3].
    """
    count = min(_STRIP_FRAMES, len(frames))
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    file = io.BytesIO()
    Image.fromarray(np.concatenate(frames[chosen], axis=1)).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
