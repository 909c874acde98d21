"""Built datasets on disk: location, splits and captions, and random access to frames.

`python -m data_prep.build` writes a dataset as one TFDS split, `videos`, with one record per video.
The splits of the dataset's protocol are in its metadata, as lists of (video, captions). Reading
does not import TensorFlow.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from drl_jax.config import Config
from drl_jax.data.storage import StorageSpec
from drl_jax.runtime.errors import UserError

# Increase it when the layout of the records or of the metadata changes.
FORMAT_VERSION = "1.0.0"
VIDEOS_SPLIT = "videos"
# File that records what a dataset was built from (`data_prep/manifest.py`).
MANIFEST = "manifest.json"


class DatasetError(UserError):
    """A dataset is missing, or does not contain what was requested."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Videos of a split and their captions.

    Attributes:
      videos: int32 [V], record indices of the videos.
      captions: the captions of each video, at least one.
      reversed_pairs: int32 [P, 2], indices into `videos` of a clip and its time reversal (P = 0 for
        most datasets).
    """

    videos: np.ndarray
    captions: list[list[str]]
    reversed_pairs: np.ndarray

    def caption_pairs(self) -> tuple[np.ndarray, list[str]]:
        """All (video, caption) pairs.

        Returns:
          caption_to_video int32 [N], the index into `videos` of each caption, and the N captions.
        """
        videos = np.arange(len(self.videos), dtype=np.int32)
        caption_to_video = np.repeat(videos, self.caption_counts())
        return caption_to_video, [caption for captions in self.captions for caption in captions]

    def caption_counts(self) -> np.ndarray:
        """Number of captions of each video, int64 [V]."""
        return np.array([len(captions) for captions in self.captions], np.int64)


def dataset_dir(config: Config) -> Path:
    """Directory of the built dataset that a configuration uses; it may not exist yet."""
    data = config.data
    storage = StorageSpec(config.model.backbone.image_resolution, data.max_frames, data.storage)
    return Path(data.data_dir) / data.dataset / storage.name / FORMAT_VERSION


class VideoDataset:
    """A built dataset."""

    def __init__(self, directory: Path):
        """Opens the dataset in `directory`.

        Raises:
          DatasetError: there is no dataset in it.
        """
        if not (directory / "dataset_info.json").is_file():
            raise DatasetError(_not_built_message(directory))
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
        """Ids of all stored videos, in record order."""
        return self._metadata["video_ids"]

    @property
    def sources(self) -> list[list]:
        """Source of each record: [path below the videos' folder] or [path, start, end] in seconds.

        Empty for a dataset built by a version that did not store it.
        """
        return self._metadata.get("sources", [])

    @property
    def manifest(self) -> dict[str, Any]:
        """What the dataset was built from (`data_prep/manifest.py`); empty without a manifest."""
        return read_manifest(self.directory)

    @property
    def content(self) -> str:
        """Hash of all stored frames, ids and captions: hexadecimal SHA-256.

        Two builds of the same files have the same hash. Empty for a dataset of a version that
        wrote no manifest.
        """
        if not (frames := self.manifest.get("content")):
            return ""
        described = {name: self._metadata[name] for name in ("video_ids", "splits")}
        text = json.dumps({"frames": frames, **described}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def split(self, name: str) -> Split:
        """The videos and captions of a split.

        Raises:
          DatasetError: the dataset has no such split.
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
        """Frames of the video with a record index: uint8 [F, H, W, 3]."""
        return np.asarray(self._source[int(video)]["frames"])


def read_manifest(directory: Path) -> dict[str, Any]:
    """Manifest of the dataset in a directory; empty if it has none."""
    path = directory / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _not_built_message(directory: Path) -> str:
    dataset, storage = directory.parent.parent, directory.parent.name
    built = sorted(path.parent.name for path in dataset.glob("*/" + directory.name))
    found = f" (built variants: {', '.join(built)})" if built else ""
    return (
        f"no dataset in {directory}{found}; build it with: python -m data_prep.build"
        f" {dataset.name} --data_dir={dataset.parent}, with flags that give {storage}"
    )
