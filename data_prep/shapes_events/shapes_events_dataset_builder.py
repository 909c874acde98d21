"""Synthetic clips on which methods differ: order, binding and count of events."""

import functools
from pathlib import Path

from data_prep.shapes.draw import EVENT_SECONDS, draw_event_clip
from data_prep.shapes.drawn_builder import DrawnBuilder, draw_files
from data_prep.shapes.events import SIZES, captions, split_clips
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.storage import StorageSpec

_CAPTIONS = 8
_SEED = 0


class Builder(DrawnBuilder):
    """Two coloured shapes and their events; all clips of val and of test are pairs of the same
    frames in another order."""

    DEFAULT_STORAGE = StorageSpec(FrameForm(64), EVENT_SECONDS, "raw")

    @classmethod
    def draw(cls, directory: Path, size: str) -> None:
        clips, pairs = split_clips(*SIZES[size], seed=_SEED)
        draw_files(
            directory,
            clips,
            draw=draw_event_clip,
            caption=functools.partial(captions, count=_CAPTIONS),
            pairs=pairs,
        )
