"""Built datasets on disk: location, splits and captions, and random access to frames.

`python -m data_prep.build` writes a dataset as one TFDS split, `videos`, with one record per video.
The splits of the dataset's protocol are lists of (video, captions) in files of their own
(`drl_jax/data/description.py`). Reading does not import TensorFlow.
"""

import contextlib
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from drl_jax.config import FRAME_CLOCKS, Config
from drl_jax.data.content import queries_sha256
from drl_jax.data.description import LAYOUT, METADATA, read_split, read_videos
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.record_files import RecordFiles
from drl_jax.data.splits import Split
from drl_jax.data.storage import DRAWN_DATASETS, StorageSpec
from drl_jax.runtime.errors import UserError, one_line, raise_if_refused
from drl_jax.runtime.files import sha256

# Increase it when the layout of the records changes. It is a part of the path: a dataset of another
# version is not found.
FORMAT_VERSION = "1.0.0"
VIDEOS_SPLIT = "videos"
# File that records what a dataset was built from (`data_prep/manifest.py`).
MANIFEST = "manifest.json"
# Files that TFDS writes beside the records. The records have checksums of their own.
DESCRIPTIONS = ("dataset_info.json", "features.json", METADATA)
# What a file that is missing, cut or of other content raises.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)


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
      manifest: what it was built from (`data_prep/manifest.py`).
      content: hexadecimal SHA-256 of all frames, ids and captions; two builds of the same files
        have the same.
      split_names: names of the stored splits.
      video_ids: ids of all stored videos, in record order.
      sources: source of each record (`description.Sources`).
      id_hashes: uint64 [V], the first 8 bytes of the SHA-256 of each id.
    """

    def __init__(self, directory: Path):
        """Opens the dataset in `directory`.

        Checks all files but the captions, which `split` checks, and the content of the records.

        Raises:
          DatasetError: there is no dataset in it, or it is damaged or has another layout.
          Unavailable: a file cannot be read.
        """
        if not directory.is_dir():
            raise DatasetError(_not_built_message(directory))
        # The Python API, which shares modules with this one, needs no dataset.
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2

        self.directory = directory
        self.manifest = read_manifest(directory)
        self._hashes: dict[str, str] = self.manifest["files"]
        self._splits: dict[str, Split] = {}
        try:
            self.storage = StorageSpec.from_name(directory.parent.name)
            _check_sampling(self.manifest["settings"], self.storage)
            for name in DESCRIPTIONS:
                if sha256(directory / name) != self._hashes[name]:
                    raise ValueError(f"{name} is not the file that the build wrote")
            info = tfds.builder_from_directory(str(directory)).info
            metadata = dict(info.metadata)
            if (layout := metadata.get("layout", 1)) != LAYOUT:
                command = _build_command(directory, "--overwrite")
                raise DatasetError(
                    f"{directory} has the layout {layout}, of another version, and this one reads"
                    f" {LAYOUT}; rebuild it with: {command}"
                )
            self.content = str(self.manifest["content_with_captions"])
            splits = metadata["splits"].items()
            self._reversed_pairs = {name: split["reversed_pairs"] for name, split in splits}
            self.split_names = list(self._reversed_pairs)
            self.video_ids, self.sources, self.id_hashes = read_videos(directory, self._hashes)
            stored = info.splits[VIDEOS_SPLIT]
            files = [directory / Path(name).name for name in stored.filenames]
            self._records = RecordFiles(files, stored.shard_lengths)
            self._example = tf_example_pb2.Example
            if (named := len(self.video_ids)) != len(self._records):
                raise ValueError(f"it names {named} of its {len(self._records)} videos")
        except DatasetError:
            raise
        # TFDS raises many kinds of errors for a damaged file.
        except Exception as error:
            raise _damaged(directory, directory, error) from error

    def __len__(self) -> int:
        return len(self._records)

    def split(self, name: str) -> Split:
        """The videos and captions of a split; the first time, its file is checked.

        Raises:
          DatasetError: the dataset has no such split, or the file of its captions is damaged.
          Unavailable: that file cannot be read.
        """
        if name not in self.split_names:
            raise DatasetError(
                f"the dataset in {self.directory} has no split {name!r}; it has"
                f" {', '.join(self.split_names)}"
            )
        if name not in self._splits:
            pairs = self._reversed_pairs[name]
            try:
                self._splits[name] = read_split(self.directory, name, pairs, self._hashes)
            except _DAMAGED as error:
                raise _damaged(self.directory, self.directory, error) from error
        return self._splits[name]

    def queries_sha256(self, split: Split) -> str:
        """Hexadecimal SHA-256 of the ids and captions of a split, in their order."""
        ids = self.video_ids
        return queries_sha256((ids[video] for video in split.videos), split.captions)

    def protocol(self, split_name: str) -> str:
        """What publications call the protocol of a stored split, e.g. 1k-A; empty if unknown."""
        return str(self.manifest["splits"].get(split_name, {}).get("protocol", ""))

    def read_frames(self, video: int) -> np.ndarray:
        """Frames of the video with a record index: uint8 [F, H, W, 3].

        Raises:
          DatasetError: the record is damaged, or is that of another video or storage variant.
          Unavailable: its file cannot be read.
        """
        video = int(video)
        video_id = self.video_ids[video]
        try:
            # What a TFDS feature would do, in a third of the time.
            features = self._example.FromString(self._records[video]).features.feature
            (stored_id,) = features["video_id"].bytes_list.value
            if stored_id != video_id.encode():
                raise ValueError(f"it holds the video {stored_id!r}")
            stored, shape = features["frames"].bytes_list.value, self.storage.form.shape
            if self.storage.encoding == "jpeg":
                frames = np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in stored])
                if frames.shape[1:] != shape:
                    raise ValueError(f"it has frames {list(frames.shape)}")
            else:
                frames = np.frombuffer(b"".join(stored), np.uint8).reshape(-1, *shape)
            if not 1 <= len(frames) <= self.storage.max_frames:
                raise ValueError(f"it has {len(frames)} frames")
        # array_record raises RuntimeError for a wrong checksum, and other errors at other places.
        except Exception as error:
            what = f"{self._records.file(video)}, record {video} (video {video_id})"
            raise _damaged(self.directory, what, error) from error
        return frames


def read_manifest(directory: Path) -> dict[str, Any]:
    """Manifest of the dataset in a directory; raises as `VideoDataset`."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        texts = [manifest["content"], manifest["versions"]["av"]]
        texts += [*manifest["annotations"].values(), *manifest["files"].values()]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a hash is no text")
        parts = [manifest["settings"], manifest["left_out"], *manifest["splits"].values()]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("a part is no object")
    except _DAMAGED as error:
        raise _damaged(directory, path, error) from error
    return manifest


def _check_sampling(settings: dict[str, Any], storage: StorageSpec) -> None:
    """Compares what a dataset was built as with the name of its directory."""
    names = ("resize", "interpolation", "as_shown")
    form = FrameForm(settings["image_size"], **{n: settings[n] for n in names if n in settings})
    kept = settings["max_frames"], settings["storage"]
    clock = settings.get("frame_clock", FRAME_CLOCKS[0])
    if (found := StorageSpec(form, *kept, clock)) != storage:
        raise ValueError(f"{MANIFEST} says {found}")


def _damaged(directory: Path, what: str | Path, error: Exception) -> DatasetError:
    """The error of a damaged part of the dataset in `directory`, unless it was refused."""
    raise_if_refused(what, error)
    command = _build_command(directory, "--overwrite")
    return DatasetError(f"{what} is damaged ({one_line(error)}); rebuild it with: {command}")


def _not_built_message(directory: Path) -> str:
    wanted = directory.parent
    built = sorted(path.parent.name for path in wanted.parent.glob("*/" + directory.name))
    stored = ", ".join(map(_described, built))
    found = f": wanted is {_described(wanted.name)}, stored is {stored}" if stored else ""
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
    flags = [f"--data_dir={dataset.parent}"]
    if dataset.name not in DRAWN_DATASETS:
        flags += ["--videos=DIR", "--annotations=PATH"]
    with contextlib.suppress(ValueError):  # A user gave the directory another name.
        flags += StorageSpec.from_name(variant).flags(dataset.name)
    return shlex.join(["python", "-m", "data_prep.build", dataset.name, *flags, *other])
