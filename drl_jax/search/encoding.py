"""Encodes the windows of videos that were read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.search.calibration import BANK_ARRAY, bank_similarity
from drl_jax.search.hubness import HUBNESS_ARRAY, hubness_of, read_bank
from drl_jax.search.reading import VideoRead, frames_of


def encode_reads(model: RetrievalModel, reads: Sequence[VideoRead]) -> Features:
    """Encodes all windows, in order; videos of one window are encoded together.

    Args:
      model: encodes the windows.
      reads: videos that were read; those with an error have no windows.

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
    if not rows:
        return {}
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def delete_spooled(reads: Sequence[VideoRead]) -> None:
    """Deletes the files of the frames of long videos, which were encoded."""
    for read in reads:
        if read.spooled is not None:
            read.spooled.unlink(missing_ok=True)


class WindowEncoder:
    """Encodes windows for an index, with what it stores of its banks of captions."""

    def __init__(self, model: RetrievalModel, directory: Path, header: Mapping[str, Any]):
        """Encodes nothing before the first call.

        Args:
          model: of the index.
          directory: of the index.
          header: of the index.
        """
        self._model, self._directory, self._header = model, directory, header
        # The banks of captions, encoded.
        self._bank: Features | None = None
        self._hubness_bank: Features | None = None

    def encode(self, reads: Sequence[VideoRead]) -> Features:
        """Features of all windows, in order."""
        features = encode_reads(self._model, reads)
        if not features:
            return {}
        model, header, of_banks = self._model, self._header, {}
        # Indexes of earlier versions have no bank.
        if sentences := header.get("bank"):
            if self._bank is None:
                self._bank = model.encode_text(sentences)
            of_banks[BANK_ARRAY] = bank_similarity(model, self._bank, features)
        if "hubness" in header:
            if self._hubness_bank is None:
                self._hubness_bank = model.encode_text(read_bank(self._directory, header))
            of_banks[HUBNESS_ARRAY] = hubness_of(model, header, self._hubness_bank, features)
        return features | of_banks
