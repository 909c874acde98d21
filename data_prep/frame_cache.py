"""Cache of decoded frames, one file per video, so that no video is decoded twice.

The key of an entry is the source file (path, size, modification time) and the place in it, the
span, the storage variant and the versions of the decoding packages. It does not depend on
annotations.
"""

import hashlib
import importlib.metadata
import zipfile
from pathlib import Path
from typing import TypeAlias

import numpy as np

from data_prep.locations import Clip, file_of
from drl_jax.data.storage import StorageSpec
from drl_jax.runtime.errors import refusal
from drl_jax.runtime.files import replacing

# Encoded frames of a video: uint8 [F, S, S, 3] for `raw`, F JPEG files for `jpeg`.
Frames: TypeAlias = np.ndarray | list[bytes]


def decoder_versions() -> dict[str, str]:
    """Versions of the packages that stored frames depend on."""
    return {package: importlib.metadata.version(package) for package in ("av", "pillow")}


class FrameCache:
    """Cache entries of one storage variant.

    Attributes:
      directory: directory of the entries; it may not exist yet.
      storage: the storage variant.
    """

    def __init__(self, directory: Path, storage: StorageSpec):
        """Chooses the variant's directory below `directory`; creates nothing."""
        versions = "_".join(f"{name}{version}" for name, version in decoder_versions().items())
        self.directory = directory / f"{storage.name}_{versions}"
        self.storage = storage
        # The last source file: many clips may come from one.
        self._file: tuple[Path | None, tuple[str, int, int]] = (None, ("", 0, 0))

    def entry(self, clip: Clip) -> Path:
        """Path of a clip's entry, which may not exist.

        Raises:
          OSError: the source file cannot be accessed.
        """
        place = () if isinstance(clip.location, Path) else clip.location.place
        identity = (*self._identity(file_of(clip.location)), *place, clip.span)
        key = hashlib.sha256(repr(identity).encode()).hexdigest()
        return self.directory / key[:2] / f"{key[2:34]}.npz"

    def _identity(self, path: Path) -> tuple[str, int, int]:
        if path != self._file[0]:
            status = path.stat()
            self._file = path, (str(path.resolve()), status.st_size, status.st_mtime_ns)
        return self._file[1]


def write_entry(path: Path, frames: Frames) -> None:
    """Writes an entry atomically."""
    arrays = [frames]
    if isinstance(frames, list):
        arrays = [np.frombuffer(jpeg, np.uint8) for jpeg in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through a file object: numpy appends .npz to a path.
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, *arrays)


def read_entry(path: Path) -> Frames | None:
    """Reads the frames of an entry; None if it does not exist or is damaged.

    Raises:
      OSError: it cannot be read.
    """
    try:
        # The file is a zip: every array has a checksum.
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[f"arr_{number}"] for number in range(len(file.files))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        if (refused := refusal(error)) is not None:
            raise refused from error
        return None
    if not arrays:
        return None
    return arrays[0] if arrays[0].ndim == 4 else [array.tobytes() for array in arrays]
