"""Built datasets on disk: location, splits and captions, and random access to frames.

`python -m data_prep.build` writes a dataset as one TFDS split, `videos`, with one record per video.
The splits of the dataset's protocol are in its description, as lists of (video, captions)
(`drl_jax/data/description.py`). Reading does not import TensorFlow.
"""

import contextlib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.config import Config
from drl_jax.data.content import queries_sha256
from drl_jax.data.description import METADATA, Description
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.record_files import RecordFiles
from drl_jax.data.splits import Split
from drl_jax.data.storage import StorageSpec, build_command
from drl_jax.runtime.errors import UserError, one_line, raise_if_refused
from drl_jax.runtime.files import sha256

# Increase it when the layout of the records changes. It is a part of the path: a dataset of another
# version is not found. The metadata has a layout of its own, so that earlier ones are found.
FORMAT_VERSION = "1.0.0"
VIDEOS_SPLIT = "videos"
# File that records what a dataset was built from (`data_prep/manifest.py`).
MANIFEST = "manifest.json"
# Files that TFDS writes beside the records. The records have checksums of their own.
DESCRIPTIONS = ("dataset_info.json", "features.json", METADATA)
# What a file that is missing, cut or of other content raises.
_DAMAGED = (OSError, ValueError, KeyError, TypeError)


class DatasetError(UserError):
    """A dataset is missing or damaged, or does not contain what was requested."""


def dataset_dir(config: Config) -> Path:
    """Directory of the built dataset that a configuration uses; it may not exist yet."""
    data = config.data
    return Path(data.data_dir) / data.dataset / StorageSpec.of(config).name / FORMAT_VERSION


class VideoDataset:
    """A built dataset.

    Attributes:
      directory: its directory.
      storage: its storage variant.
      manifest: what it was built from (`data_prep/manifest.py`); empty without a manifest.
    """

    def __init__(self, directory: Path):
        """Opens the dataset in `directory`.

        Checks all files but the captions of the splits, which `split` checks, and the content of
        the records.

        Raises:
          DatasetError: there is no dataset in it, or it is damaged.
          Unavailable: a file cannot be read.
        """
        if not directory.is_dir():
            raise DatasetError(_not_built_message(directory))
        # The Python API, which shares modules with this one, needs no dataset.
        import tensorflow_datasets as tfds

        self.directory = directory
        self.manifest: dict[str, Any] = read_manifest(directory)
        try:
            self.storage = StorageSpec.from_name(directory.parent.name)
            _check_form(self.manifest, self.storage.form)
            _check_descriptions(directory, self.manifest)
            info = tfds.builder_from_directory(str(directory)).info
            self._description = Description(
                directory, dict(info.metadata), self.manifest.get("files", {})
            )
            stored = info.splits[VIDEOS_SPLIT]
            files = [directory / Path(name).name for name in stored.filenames]
            self._records = RecordFiles(files, stored.shard_lengths)
            self._features = info.features
            named = len(self._description.videos.ids)
            if len(self._records) != named:
                raise ValueError(f"{METADATA} describes {named} of its {len(self._records)} videos")
        # TFDS raises many kinds of errors for a damaged file.
        except Exception as error:
            raise _damaged(directory, directory, error) from error

    def __len__(self) -> int:
        """Number of stored videos."""
        return len(self._records)

    @property
    def split_names(self) -> list[str]:
        return self._description.split_names

    @property
    def video_ids(self) -> Sequence[str]:
        """Ids of all stored videos, in record order."""
        return self._description.videos.ids

    @property
    def sources(self) -> Sequence[list]:
        """Source of each record: [path below the videos' folder] or [path, start, end] in seconds.

        Empty for a dataset built by a version that did not store it.
        """
        return self._description.videos.sources

    @functools.cached_property
    def content(self) -> str:
        """Hash of all stored frames, ids and captions: hexadecimal SHA-256.

        Two builds of the same files have the same hash. Empty for a dataset of a version that
        wrote no manifest.
        """
        if not (frames := self.manifest.get("content")):
            return ""
        if stored := self.manifest.get("content_with_captions"):
            return str(stored)
        try:
            return self._description.content(frames)
        except _DAMAGED as error:
            raise _damaged(self.directory, self.directory, error) from error

    def id_hashes(self, videos: np.ndarray) -> np.ndarray:
        """The first 8 bytes of the SHA-256 of ids, as numbers.

        Args:
          videos: int [V], record indices.

        Returns:
          uint64 [V].
        """
        return self._description.id_hashes(videos)

    def of_same_files(self, videos: np.ndarray) -> np.ndarray:
        """All videos whose source files are those of some videos.

        Args:
          videos: int [V], record indices.

        Returns:
          int [W], record indices; W is V or more.
        """
        return self._description.of_same_files(videos)

    def split(self, name: str) -> Split:
        """The videos and captions of a split.

        Raises:
          DatasetError: the dataset has no such split, or the file of its captions is damaged.
          Unavailable: that file cannot be read.
        """
        if name not in self.split_names:
            raise DatasetError(
                f"the dataset in {self.directory} has no split {name!r}; it has"
                f" {', '.join(self.split_names)}"
            )
        try:
            return self._description.split(name)
        except _DAMAGED as error:
            raise _damaged(self.directory, self.directory, error) from error

    def queries_sha256(self, split: Split) -> str:
        """Hexadecimal SHA-256 of the ids and captions of a split, in their order."""
        ids = self.video_ids
        return queries_sha256((ids[video] for video in split.videos), split.captions)

    def protocol(self, split_name: str) -> str:
        """What publications call the protocol of a stored split, e.g. 1k-A; empty if unknown."""
        return str(self.manifest.get("splits", {}).get(split_name, {}).get("protocol", ""))

    def read_frames(self, video: int) -> np.ndarray:
        """Frames of the video with a record index: uint8 [F, H, W, 3].

        Raises:
          DatasetError: the record is damaged, or is that of another video or storage variant.
          Unavailable: its file cannot be read.
        """
        video = int(video)
        video_id = self.video_ids[video]
        try:
            record = self._features.deserialize_example_np(self._records[video])
            stored_id, frames = record["video_id"], np.asarray(record["frames"])
            if stored_id not in (video_id, video_id.encode()):
                raise ValueError(f"it holds the video {stored_id!r}")
            _check_frames(frames, self.storage)
        # array_record raises RuntimeError for a wrong checksum, and other errors at other places.
        except Exception as error:
            what = f"{self._records.file(video)}, record {video} (video {video_id})"
            raise _damaged(self.directory, what, error) from error
        return frames


def read_manifest(directory: Path) -> dict[str, Any]:
    """Manifest of the dataset in a directory; empty if it has none.

    Raises:
      DatasetError: it is damaged.
      Unavailable: it cannot be read.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise TypeError("it is not an object")
        for name in ("annotations", "files"):
            _check_hashes(name, manifest.get(name, {}))
        # What a training prints.
        str(manifest["content"]), str(manifest["versions"]["av"]), len(manifest["left_out"])
        if not all(isinstance(s, dict) for s in dict(manifest.get("splits", {})).values()):
            raise TypeError("its splits are not objects by name")
    except FileNotFoundError:
        return {}
    except _DAMAGED as error:
        raise _damaged(directory, path, error) from error
    return manifest


def _check_hashes(name: str, hashes: object) -> None:
    if not isinstance(hashes, dict) or not all(isinstance(h, str) for h in hashes.values()):
        raise TypeError(f"its {name} are not hashes by file name")


def _check_descriptions(directory: Path, manifest: dict[str, Any]) -> None:
    """Compares the files that TFDS wrote with their hashes, if the manifest has them."""
    hashes = manifest.get("files", {})
    for name in DESCRIPTIONS:
        (directory / name).stat()
        if name in hashes and sha256(directory / name) != hashes[name]:
            raise ValueError(f"{name} is not the file that the build wrote")


def _check_form(manifest: dict[str, Any], form: FrameForm) -> None:
    """Compares what the pixels of a frame do not show with the name of its directory."""
    if not manifest:
        return
    fields = manifest.get("settings", {})
    stored = {name: fields[name] for name in ("resize", "interpolation") if name in fields}
    if (found := FrameForm(form.size, **stored)) != form:
        raise ValueError(f"{MANIFEST} says {found.resize}, {found.interpolation}")


def _check_frames(frames: np.ndarray, storage: StorageSpec) -> None:
    shape = storage.form.shape
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != shape:
        raise ValueError(f"it has frames {frames.dtype} {list(frames.shape)}")
    if not 1 <= len(frames) <= storage.max_frames:
        raise ValueError(f"it has {len(frames)} frames")


def _damaged(directory: Path, what: str | Path, error: Exception) -> DatasetError:
    """The error of a damaged part of the dataset in `directory`, unless it was refused."""
    raise_if_refused(what, error)
    command = _build_command(directory, "--overwrite")
    return DatasetError(f"{what} is damaged ({one_line(error)}); rebuild it with: {command}")


def _not_built_message(directory: Path) -> str:
    wanted = directory.parent
    built = sorted(path.parent.name for path in wanted.parent.glob("*/" + directory.name))
    found = ""
    if built:
        stored = ", ".join(map(_described, built))
        found = f": wanted is {_described(wanted.name)}, stored is {stored}"
    return f"no dataset in {directory}{found}; build it with: {_build_command(directory)}"


def _described(name: str) -> str:
    """A storage variant in words; its directory's name if a user gave it another."""
    try:
        return str(StorageSpec.from_name(name))
    except ValueError:
        return name


def _build_command(directory: Path, *other: str) -> str:
    """The command that builds the dataset of a directory."""
    dataset, variant = directory.parent.parent, directory.parent.name
    flags = []
    with contextlib.suppress(ValueError):  # A user gave the directory another name.
        flags = StorageSpec.from_name(variant).flags()
    return build_command(dataset.name, dataset.parent, [*flags, *other])
