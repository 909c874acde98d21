"""Encodes the windows of videos that were read, as an index stores them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.search.calibration import BANK_ARRAY, bank_similarity
from drl_jax.search.hubness import HUBNESS_ARRAY, hubness_of, read_bank
from drl_jax.search.quantization import quantize
from drl_jax.search.reading import VideoRead, frames_of


class WindowEncoder:
    """Encodes videos for an index, with what it stores of its banks of captions."""

    def __init__(self, model: RetrievalModel, directory: Path, header: Mapping[str, Any]):
        """Encodes nothing before the first call.

        Args:
          model: of the index.
          directory: of the index.
          header: of the index.
        """
        self._model, self._directory, self._header = model, directory, header
        self._banks: tuple[Features, Features | None] | None = None

    def encode(self, reads: Sequence[VideoRead]) -> list[dict[str, np.ndarray]]:
        """The arrays of each video that need the model; see `VideoRecord.arrays`.

        Videos of one window are encoded together; those with an error have no arrays.
        """
        short = [read.frames for read in reads if read.frames is not None]
        together = self._model.encode_videos(short) if short else {}
        rows: list[Features] = []  # Of all windows, in order.
        features = [np.zeros((0, self._model.config.model.backbone.embed_dim), np.float32)] * len(reads)
        next_short = 0
        for number, read in enumerate(reads):
            if read.frames is not None:
                rows.append({name: a[[next_short]] for name, a in together.items()})
                next_short += 1
            elif read.spooled is not None:
                image_feat = self._model.encode_frames(frames_of(read, self._model.frame_form))
                rows.append(self._model.encode_frame_windows(image_feat, read.windows))
                if len(read.windows) > 1:
                    features[number] = image_feat
        if not rows:
            return [{} for _ in reads]
        windows = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        ends = np.cumsum([len(read.windows) for read in reads])
        of_windows = {n: np.split(a, ends[:-1]) for n, a in self._stored(windows).items()}
        return [
            {f"window.{name}": parts[number] for name, parts in of_windows.items()}
            | {f"feature.{name}": a for name, a in quantize({"image_feat": feat}, "bfloat16").items()}
            if read.arrays
            else {}
            for number, (read, feat) in enumerate(zip(reads, features, strict=True))
        ]

    def _stored(self, windows: Features) -> Features:
        """What is stored of windows."""
        stored = quantize(windows, self._header["storage"])
        if self._model.interaction.HAS_VECTORS:
            vectors = self._model.interaction.video_vectors(windows)
            stored |= quantize({"pooled_unit": vectors}, "int8")
        return stored | self._of_banks(windows)

    def _of_banks(self, windows: Features) -> Features:
        model, header = self._model, self._header
        if self._banks is None:
            hubness = read_bank(self._directory, header) if "hubness" in header else []
            self._banks = (
                model.encode_text(header["bank"]),
                model.encode_text(hubness) if hubness else None,
            )
        bank, hubness_bank = self._banks
        arrays = {BANK_ARRAY: bank_similarity(model, bank, windows)}
        if hubness_bank is not None:
            arrays[HUBNESS_ARRAY] = hubness_of(model, header, hubness_bank, windows)
        return arrays
