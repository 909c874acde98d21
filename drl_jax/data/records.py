"""Built datasets on disk: location, splits and captions, and random access to frames.

`python -m data_prep.build` writes a dataset as one TFDS split, `videos`, with one record per video.
The splits of the dataset's protocol are in its metadata, as lists of (video, captions). Reading
does not import TensorFlow.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from drl_jax.config import Config
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.storage import StorageSpec, build_command
from drl_jax.runtime.errors import UserError, one_line
from drl_jax.runtime.files import sha256

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# Increase it when the layout of the records or of the metadata changes.
FORMAT_VERSION = "1.0.0"
VIDEOS_SPLIT = "videos"
# File that records what a dataset was built from (`data_prep/manifest.py`).
MANIFEST = "manifest.json"
# Files that TFDS writes beside the records. The records have checksums of their own.
DESCRIPTIONS = ("dataset_info.json", "features.json", "metadata.json")


class DatasetError(UserError):
    """A dataset is missing or damaged, or does not contain what was requested."""


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
    return Path(data.data_dir) / data.dataset / StorageSpec.of(config).name / FORMAT_VERSION


class VideoDataset:
    """A built dataset.

    Attributes:
      directory: its directory.
      storage: its storage variant.
      manifest: what it was built from (`data_prep/manifest.py`); empty without a manifest.
    """

    def __init__(self, directory: Path):
        """Opens the dataset in `directory`; checks all files but the content of the records.

        Raises:
          DatasetError: there is no dataset in it, or it is damaged.
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
            builder = tfds.builder_from_directory(str(directory))
            self._metadata = dict(builder.info.metadata)
            self._source = builder.as_data_source(split=VIDEOS_SPLIT)
            self._shards = _Shards.of(builder.info.splits[VIDEOS_SPLIT])
            stored, named = len(self._source), len(self._metadata["video_ids"])
            if stored != named or "splits" not in self._metadata:
                raise ValueError(f"metadata.json describes {named} of its {stored} videos")
        # TFDS raises many kinds of errors for a damaged file.
        except Exception as error:
            raise DatasetError(_damaged_message(directory, directory, error)) from error

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

    def queries_sha256(self, split: Split) -> str:
        """Hexadecimal SHA-256 of the ids and captions of a split, in their order."""
        ids = [self.video_ids[video] for video in split.videos]
        text = json.dumps([ids, split.captions], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def protocol(self, split_name: str) -> str:
        """What publications call the protocol of a stored split, e.g. 1k-A; empty if unknown."""
        return str(self.manifest.get("splits", {}).get(split_name, {}).get("protocol", ""))

    def read_frames(self, video: int) -> np.ndarray:
        """Frames of the video with a record index: uint8 [F, H, W, 3].

        Raises:
          DatasetError: the record is damaged, or is that of another video or storage variant.
        """
        video = int(video)
        video_id = self.video_ids[video]
        try:
            record = self._source[video]
            stored_id, frames = record["video_id"], np.asarray(record["frames"])
            if stored_id not in (video_id, video_id.encode()):
                raise ValueError(f"it holds the video {stored_id!r}")
            _check_frames(frames, self.storage)
        except MemoryError:
            raise
        # array_record raises RuntimeError for a wrong checksum, and other errors at other places.
        except Exception as error:
            what = f"{self._shards.file(video)}, record {video} (video {video_id})"
            raise DatasetError(_damaged_message(self.directory, what, error)) from error
        return frames


@dataclasses.dataclass(frozen=True)
class _Shards:
    """Files of the records.

    Attributes:
      files: their paths.
      ends: for each file, the number of records in it and in those before it.
    """

    files: list[Path]
    ends: list[int]

    @classmethod
    def of(cls, split: "tfds.core.SplitInfo") -> "_Shards":
        files = [Path(path) for path in split.filepaths]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file.name} is missing")
        return cls(files, list(itertools.accumulate(split.shard_lengths)))

    def file(self, record: int) -> Path:
        return self.files[bisect.bisect_right(self.ends, record)]


def read_manifest(directory: Path) -> dict[str, Any]:
    """Manifest of the dataset in a directory; empty if it has none.

    Raises:
      DatasetError: it is damaged.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return {}
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(_damaged_message(directory, path, error)) from error
    return manifest


def _check_hashes(name: str, hashes: object) -> None:
    if not isinstance(hashes, dict) or not all(isinstance(h, str) for h in hashes.values()):
        raise TypeError(f"its {name} are not hashes by file name")


def _check_descriptions(directory: Path, manifest: dict[str, Any]) -> None:
    """Compares the files that TFDS wrote with their hashes, if the manifest has them."""
    for name in DESCRIPTIONS:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{name} is missing")
    for name, digest in manifest.get("files", {}).items():
        if sha256(directory / name) != digest:
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


def _damaged_message(directory: Path, what: object, error: Exception) -> str:
    command = _build_command(directory, "--overwrite")
    return f"{what} is damaged or cannot be read ({one_line(error)}); rebuild it with: {command}"


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
