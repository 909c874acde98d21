"""Encodes the windows of videos that were read."""

from collections.abc import Sequence

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.search.reading import VideoRead, frames_of


def encode_reads(model: RetrievalModel, reads: Sequence[VideoRead]) -> Features:
    """Encodes all windows, in order; videos of one window are encoded together.

    Args:
      model: encodes the windows.
      reads: videos that were read; those with an error have no windows. The files of their frames
        are deleted.

    Returns:
      NumPy arrays as of `RetrievalModel.encode_videos`, one row for each window; none if there is
      no window.
    """
    short = [read.frames for read in reads if read.frames is not None]
    rows: list[Features] = []
    encoded = model.encode_videos(short) if short else {}
    next_short = 0
    for read in reads:
        if read.frames is not None:
            rows.append({name: a[next_short : next_short + 1] for name, a in encoded.items()})
            next_short += 1
        elif read.spooled is not None:
            windows = [window.frames for window in read.windows]
            frames = frames_of(read, model.frame_form)
            rows.append(model.encode_windows(frames, windows))
            del frames
            read.spooled.unlink()
    if not rows:
        return {}
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
