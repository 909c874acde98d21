"""Synthetic stills, on which the small CLIP that `configs/shapes.py` starts from is trained."""

import functools
import random
from pathlib import Path

from data_prep.shapes.draw import draw_still
from data_prep.shapes.drawn_builder import DrawnBuilder, draw_files
from data_prep.shapes.stills import SIZES, captions, split_stills
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.storage import StorageSpec

_CAPTIONS = 5
_SEED = 0


class Builder(DrawnBuilder):
    """One frame with two coloured shapes, each with a size and one of 3 x 3 places."""

    DEFAULT_STORAGE = StorageSpec(FrameForm(64), 1, "raw")

    @classmethod
    def draw(cls, directory: Path, size: str) -> None:
        draw_files(
            directory,
            split_stills(*SIZES[size], seed=_SEED),
            draw=draw_still,
            caption=functools.partial(captions, count=_CAPTIONS, rng=random.Random(_SEED)),
        )
