"""Default dataset: synthetic clips."""

import functools
import random
from pathlib import Path

from data_prep.shapes.draw import draw_clip
from data_prep.shapes.drawn_builder import DrawnBuilder, draw_files
from data_prep.shapes.scenes import SIZES, captions, split_scenes
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.storage import StorageSpec

_CAPTIONS = 20
_SEED = 0


class Builder(DrawnBuilder):
    """Two coloured shapes, each with its own motion; half of the clips of val and of test are pairs
    that differ only in the direction of one motion."""

    DEFAULT_STORAGE = StorageSpec(FrameForm(64), 4, "raw")

    @classmethod
    def draw(cls, directory: Path, size: str) -> None:
        scenes, pairs = split_scenes(*SIZES[size], seed=_SEED)
        draw_files(
            directory,
            scenes,
            draw=draw_clip,
            caption=functools.partial(captions, count=_CAPTIONS, rng=random.Random(_SEED)),
            pairs=pairs,
        )
