"""Small pictures of the frames of indexed videos."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from drl_jax.search.reading import STRIP_FRAMES
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.store import Store


def thumbnails(store: Store, video: IndexedVideo, frames: Sequence[int]) -> bytes:
    """A JPEG file with some frames of a video side by side; empty if there are none.

    Args:
      store: the index.
      video: of the index.
      frames: indices of its sampled frames, at least one.

    Raises:
      SearchIndexError: the pictures are damaged.
    """
    if tuple(frames) == tuple(range(len(video.times))) and len(frames) <= STRIP_FRAMES:
        return store.strip(video.path, 0)
    pictures, strips = [], {}
    for frame in frames:
        number, column = divmod(frame, STRIP_FRAMES)
        if number not in strips:
            strips[number] = store.strip(video.path, number)
        if not strips[number]:
            return b""
        with Image.open(io.BytesIO(strips[number])) as strip:
            side = strip.height
            box = (column * side, 0, (column + 1) * side, side)
            pictures.append(np.asarray(strip.crop(box)))
    file = io.BytesIO()
    Image.fromarray(np.concatenate(pictures, axis=1)).save(file, "JPEG", quality=85)
    return file.getvalue()
