"""A part of an open index: the state of one directory."""

from pathlib import Path

import jax
import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.search.calibration import BANK_ARRAY
from drl_jax.search.engine import compared_arrays
from drl_jax.search.feature_checks import FeatureChecks
from drl_jax.search.format_2 import made_with
from drl_jax.search.hubness import HUBNESS_ARRAY, Correction
from drl_jax.search.quantization import dequantize
from drl_jax.search.rows import SearchIndexError, damaged
from drl_jax.search.store import Store
from drl_jax.search.videos import IndexedVideos, VideosPart


class IndexPart:
    """One state of one directory; an index that is not joined has one part.

    Slots are those of the directory, without the number of the part.

    Attributes:
      directory: of the part.
      version: `index_version` before it was opened.
      header: what it was made with.
      videos: the videos that can be found.
      unsearchable_count: number of the other files.
      arrays: what the model compares, as stored, memory-mapped; empty before the first video.
      of_banks: the arrays of the banks of captions, if there are some.
      checks: of all these arrays.
    """

    def __init__(self, directory: Path, version: tuple[int, ...], model: RetrievalModel):
        """Reads the slots of the videos, and maps the arrays.

        Args:
          directory: of the part.
          version: `index_version` of it.
          model: the model of the index.

        Raises:
          SearchIndexError: there is no index, it is damaged, or the model is another one.
        """
        self.directory, self.version = directory, version
        with Store(directory) as store:
            self.header, stored = store.header, store.arrays()
            source = VideosPart(directory, self.header["generation"])
            self.videos = IndexedVideos((source,), *store.slots())
            self.unsearchable_count = store.count() - len(self.videos)
        if not made_with(self.header, model):
            raise SearchIndexError(
                f"the index {directory} was made with another model than"
                f" {' '.join(model.source.values())}; give the model of the index, or make a new"
                " index"
            )
        self.checks = FeatureChecks(stored)
        of_banks = (BANK_ARRAY, HUBNESS_ARRAY)
        self.of_banks = {name: stored[name] for name in of_banks if name in stored}
        self.arrays = {name: array for name, array in stored.items() if name not in of_banks}
        if self.videos:
            self._check_names(model)

    def _check_names(self, model: RetrievalModel) -> None:
        # Indexes of format 3 have no checksums.
        try:
            names = jax.eval_shape(dequantize, self.arrays).keys()
        except (TypeError, ValueError) as error:
            raise damaged(self.directory, error) from error
        if missing := compared_arrays(model.config.model, model.params) - names:
            raise damaged(self.directory, f"it has no array {min(missing)}")

    @property
    def stored(self) -> Features:
        """All arrays, with those of the banks of captions."""
        return self.arrays | self.of_banks

    def biases(self, correction: Correction) -> np.ndarray:
        """What a correction for hubs subtracts from the similarities of windows: float32 [S].

        Raises:
          UserError: the part does not store it.
        """
        if not self.videos:
            return np.zeros(0, np.float32)
        if HUBNESS_ARRAY not in self.of_banks:
            raise SearchIndexError(
                f"the index {self.directory} has no bank of captions, which --hubness needs; make"
                " a new one with: python -m drl_jax.search index --bank=train|FILE"
            )
        return correction.biases(self.directory, self.header, self.of_banks[HUBNESS_ARRAY])

    def check_files(self) -> None:
        """Checks that no mapped file was cut: reading behind its end would end the process.

        Raises:
          SearchIndexError: one was.
        """
        for name, array in self.stored.items():
            path = self.directory / self.header["arrays"][name]["file"]
            try:
                is_cut = path.stat().st_size < array.nbytes
            # Another process removes the files of an older generation; they stay mapped.
            except FileNotFoundError:
                continue
            if is_cut:
                raise damaged(self.directory, f"the file of {name} was cut", can_heal=True)
