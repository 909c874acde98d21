"""TFDS builder of the datasets that the build draws itself."""

import abc
from pathlib import Path
from typing import ClassVar

from data_prep.annotations import Annotations
from data_prep.retrieval_builder import RetrievalBuilder
from data_prep.shapes.dataset_files import read_files


class DrawnBuilder(RetrievalBuilder, skip_registration=True):
    """Stores videos that `draw` makes, and their captions."""

    MAX_WORDS: ClassVar[int] = 24
    # The videos stay in the data directory, and decoding them again is cheap.
    KEEPS_CACHE: ClassVar[bool] = False

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        return read_files(path)

    @classmethod
    @abc.abstractmethod
    def draw(cls, directory: Path, size: str) -> None:
        """Draws the files (`draw_files`) of a size, a key of the sizes in `datasets.DRAWN`."""
