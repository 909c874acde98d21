"""Decoded frames of each video in a file of its own, so that no video is decoded twice.

An entry belongs to a source file as it is now (path, size, time of change), a part of it and a
stored form. Annotations do not matter to it. Decoders do: other versions have another folder.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import zipfile
from pathlib import Path

import numpy as np

from data_prep.video_folder import Clip
from drl_jax.data.records import storage_name

# Frames in stored form: uint8 [F, S, S, 3] for `raw`, F JPEG files for `jpeg`.
Frames = np.ndarray | list[bytes]


def decoder_versions() -> dict[str, str]:
    """Versions of the packages that stored frames depend on."""
    return {package: importlib.metadata.version(package) for package in ("av", "pillow")}


class FrameCache:
    """The entries of one stored form."""

    def __init__(self, directory: Path, image_size: int, max_frames: int, storage: str):
        """Names the folder of the form below `directory`; nothing is created."""
        versions = "_".join(f"{name}{version}" for name, version in decoder_versions().items())
        self.directory = directory / f"{storage_name(image_size, max_frames, storage)}_{versions}"

    def entry(self, clip: Clip) -> Path:
        """The file of a clip, whether it exists or not.

        Raises:
          OSError: the source file cannot be looked at.
        """
        status = clip.path.stat()
        identity = (str(clip.path.resolve()), status.st_size, status.st_mtime_ns, clip.span)
        key = hashlib.sha256(repr(identity).encode()).hexdigest()
        return self.directory / key[:2] / f"{key[2:34]}.npz"


def write_entry(path: Path, frames: Frames) -> None:
    """Writes the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    arrays = [frames]
    if isinstance(frames, list):
        arrays = [np.frombuffer(jpeg, np.uint8) for jpeg in frames]
    try:
        with unfinished.open("wb") as file:
            np.savez(file, *arrays)
        unfinished.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()


def read_entry(path: Path) -> Frames | None:
    """The frames of an entry; None if there is none, or one that is damaged."""
    try:
        # Every array has a checksum (the file is a zip).
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[f"arr_{number}"] for number in range(len(file.files))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if not arrays:
        return None
    return arrays[0] if arrays[0].ndim == 4 else [array.tobytes() for array in arrays]
