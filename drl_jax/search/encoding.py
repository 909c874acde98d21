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


def encode_reads(
    model: RetrievalModel, reads: Sequence[VideoRead]
) -> tuple[Features, list[np.ndarray]]:
    """Encodes the windows of videos; those of one window are encoded together.

    Returns:
      The arrays of all windows, in order, as of `RetrievalModel.encode_videos`; none without a
      window. And for each video the features of its frames, float32 [N, D]; of one window [0, D].
    """
    short = [read.frames for read in reads if read.frames is not None]
    together = model.encode_videos(short) if short else {}
    rows: list[Features] = []
    nothing = np.zeros((0, model.config.model.backbone.embed_dim), np.float32)
    features, taken = [nothing] * len(reads), 0
    for number, read in enumerate(reads):
        if read.frames is not None:
            rows.append({name: array[[taken]] for name, array in together.items()})
            taken += 1
        elif read.spooled is not None:
            image_feat = model.encode_frames(frames_of(read, model.frame_form))
            rows.append(model.encode_frame_windows(image_feat, read.windows))
            features[number] = image_feat if len(read.windows) > 1 else nothing
    names = rows[0] if rows else ()
    return {name: np.concatenate([row[name] for row in rows]) for name in names}, features


class WindowEncoder:
    """Encodes videos for an index, with what it stores of its banks of captions."""

    def __init__(self, model: RetrievalModel, directory: Path, header: Mapping[str, Any]):
        self._model, self._directory, self._header = model, directory, header
        self._banks: tuple[Features, Features | None] | None = None

    def encode(self, reads: Sequence[VideoRead]) -> list[dict[str, np.ndarray]]:
        """The arrays of each video that need the model (`VideoRecord.arrays`); errors have none."""
        windows, features = encode_reads(self._model, reads)
        if not windows:
            return [{} for _ in reads]
        ends = np.cumsum([len(read.windows) for read in reads])
        parts = {n: np.split(a, ends[:-1]) for n, a in self._stored(windows).items()}
        found = []
        for number, read in enumerate(reads):
            feat = quantize({"image_feat": features[number]}, "bfloat16")["image_feat"]
            arrays = {f"window.{name}": part[number] for name, part in parts.items()}
            found.append({**arrays, "feature.image_feat": feat} if read.arrays else {})
        return found

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
