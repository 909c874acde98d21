"""Built datasets on disk: where they lie, what they hold, how a video's frames are read.

A dataset is what `python -m data_prep.build` makes: one TFDS split, `videos`, that holds every
video once, and in its metadata the splits of the protocol as lists of (video, captions). Reading
needs no TensorFlow.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from drl_jax.config import Config
from drl_jax.runtime.errors import UserError

# Raise it when the layout of the records or of the metadata changes.
FORMAT_VERSION = "1.0.0"
VIDEOS_SPLIT = "videos"
# What a dataset was made of (`data_prep.manifest`).
MANIFEST = "manifest.json"


class DatasetError(UserError):
    """A dataset that is absent or does not hold what is asked of it."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Captions of some videos.

    Attributes:
      videos: int32 [V], positions of the videos in the dataset's records.
      captions: for each video its captions, at least one.
      reversed_pairs: int32 [P, 2], positions in `videos` of clips and the same clips backwards
        (P = 0 for most datasets).
    """

    videos: np.ndarray
    captions: list[list[str]]
    reversed_pairs: np.ndarray

    def caption_pairs(self) -> tuple[np.ndarray, list[str]]:
        """Every (video, caption) pair: positions in `videos` int32 [N], and N captions."""
        owners = np.repeat(np.arange(len(self.videos), dtype=np.int32), self.caption_counts())
        return owners, [caption for captions in self.captions for caption in captions]

    def caption_counts(self) -> np.ndarray:
        return np.array([len(captions) for captions in self.captions], np.int64)


def storage_name(image_size: int, max_frames: int, storage: str) -> str:
    """Name of one stored form of a dataset, e.g. `224px_12f_jpeg`."""
    return f"{image_size}px_{max_frames}f_{storage}"


def dataset_dir(config: Config) -> Path:
    """Where the dataset that a configuration asks for lies once it is built."""
    data = config.data
    form = storage_name(config.model.clip.image_resolution, data.max_frames, data.storage)
    return Path(data.data_dir) / data.dataset / form / FORMAT_VERSION


class VideoDataset:
    """A built dataset."""

    def __init__(self, directory: Path):
        """Opens the dataset in `directory`.

        Raises:
          DatasetError: there is none.
        """
        if not (directory / "dataset_info.json").is_file():
            raise DatasetError(_absent(directory))
        builder = tfds.builder_from_directory(str(directory))
        self.directory = directory
        self._metadata = dict(builder.info.metadata)
        self._source = builder.as_data_source(split=VIDEOS_SPLIT)

    def __len__(self) -> int:
        """Number of stored videos."""
        return len(self._source)

    @property
    def split_names(self) -> list[str]:
        return list(self._metadata["splits"])

    @property
    def video_ids(self) -> list[str]:
        """Names of all stored videos, in the order of the records."""
        return self._metadata["video_ids"]

    @property
    def sources(self) -> list[list]:
        """Where each record comes from: [path in the folder of the videos] or [path, start, end]
        (seconds); empty for a dataset that was built before this was stored."""
        return self._metadata.get("sources", [])

    @property
    def manifest(self) -> dict[str, Any]:
        """What the dataset was made of (`data_prep/manifest.py`); empty if it does not say."""
        path = self.directory / MANIFEST
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def split(self, name: str) -> Split:
        """The videos and captions of a split.

        Raises:
          DatasetError: no such split.
        """
        if name not in self._metadata["splits"]:
            raise DatasetError(
                f"the dataset in {self.directory} has no split {name!r}; it has"
                f" {', '.join(self.split_names)}"
            )
        stored = self._metadata["splits"][name]
        return Split(
            np.asarray(stored["videos"], np.int32),
            stored["captions"],
            np.asarray(stored["reversed_pairs"], np.int32).reshape(-1, 2),
        )

    def read_frames(self, video: int) -> np.ndarray:
        """Frames of the video at a position of the records: uint8 [F, H, W, 3]."""
        return np.asarray(self._source[int(video)]["frames"])


def _absent(directory: Path) -> str:
    """What to do about a missing dataset."""
    dataset, form = directory.parent.parent, directory.parent.name
    built = sorted(path.parent.name for path in dataset.glob("*/" + directory.name))
    found = f" (built there: {', '.join(built)})" if built else ""
    return (
        f"no dataset in {directory}{found}; build it with: python -m data_prep.build"
        f" {dataset.name} --data_dir={dataset.parent}, so that its form is {form}"
    )
