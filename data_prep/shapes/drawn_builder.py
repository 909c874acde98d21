"""TFDS builder of the datasets that the build draws itself."""

import abc
from pathlib import Path
from typing import ClassVar

from data_prep.annotations import Annotations
from data_prep.retrieval_builder import RetrievalBuilder
from data_prep.shapes.dataset_files import read_files


class DrawnBuilder(RetrievalBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Stores videos that `draw` makes, with annotations in the file formats of MSR-VTT."""

    MAX_WORDS: ClassVar[int] = 24
    # The videos stay in the data directory, and decoding them again is cheap.
    KEEPS_CACHE: ClassVar[bool] = False

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        return read_files(path)

    @classmethod
    @abc.abstractmethod
    def draw(cls, directory: Path, size: str) -> None:
        """Draws videos and annotations (`draw_files`), which depend only on the size.

        Args:
          directory: of the files.
          size: a key of the dataset's sizes (`data_prep.datasets.DRAWN`).
        """
