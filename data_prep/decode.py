"""Decodes videos in parallel into a cache of frames, so that no video is decoded twice.

The cache has one file per video. Its key is the source file (path, size, modification time) and the
place in it, the span, the storage variant and the versions of the decoding packages. It does not
depend on annotations. Worker processes import this module, so its imports are light.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from data_prep.locations import Clip, Location, absolute, file_of
from drl_jax.data.storage import StorageSpec
from drl_jax.data.video import Span, read_frames
from drl_jax.data.video_file import VideoError
from drl_jax.runtime.errors import one_line, refusal
from drl_jax.runtime.files import replacing
from drl_jax.runtime.worker_pool import OrderedMap, WorkerFailure, map_in_processes

_JPEG_QUALITY = 95
# Encoded frames of a video: uint8 [F, S, S, 3] for `raw`, F JPEG files for `jpeg`.
Frames: TypeAlias = np.ndarray | list[bytes]


def decoder_versions() -> dict[str, str]:
    """Versions of the packages that stored frames depend on."""
    return {package: importlib.metadata.version(package) for package in ("av", "pillow")}


class FrameCache:
    """Cache entries of one storage variant, in `directory`, which may not exist yet."""

    def __init__(self, directory: Path | None, storage: StorageSpec):
        """Chooses the variant's directory below `directory`; creates nothing.

        Without a directory, frames have no entries: every call of `decode_clips` decodes.
        """
        versions = "_".join(f"{name}{version}" for name, version in decoder_versions().items())
        self.directory = directory and directory / f"{storage.name}_{versions}"
        self.storage = storage
        # The last source file: many clips may come from one.
        self._file: tuple[Path | None, tuple[str, int, int]] = (None, ("", 0, 0))

    def entry(self, clip: Clip) -> Path | None:
        """Path of a clip's entry, which may not exist; OSError if the source file does not."""
        if self.directory is None:
            return None
        place = () if isinstance(clip.location, Path) else clip.location.place
        identity = (*self._identity(file_of(clip.location)), *place, clip.span)
        key = hashlib.sha256(repr(identity).encode()).hexdigest()
        return self.directory / key[:2] / f"{key[2:34]}.npz"

    def _identity(self, path: Path) -> tuple[str, int, int]:
        if path != self._file[0]:
            status = path.stat()
            self._file = path, (str(path.resolve()), status.st_size, status.st_mtime_ns)
        return self._file[1]


def _write_entry(path: Path, frames: Frames) -> None:
    is_jpeg = isinstance(frames, list)
    arrays = [np.frombuffer(jpeg, np.uint8) for jpeg in frames] if is_jpeg else [frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through a file object: numpy appends .npz to a path.
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, *arrays)


def _read_entry(path: Path) -> Frames | None:
    """The frames of an entry; None if it is absent or damaged. OSError if it cannot be read."""
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


def decode_clips(
    clips: Sequence[Clip],
    *,
    cache: FrameCache,
    timeout: float,
    map_calls: OrderedMap = map_in_processes,
) -> Iterator[Frames | WorkerFailure]:
    """Decodes videos, except those that the cache has, whose storage variant it has.

    Yields for each clip, in order, its frames or why there are none. `timeout` is in seconds per
    video; `map_calls` runs the decoders, on this machine or on a cluster that shares the cache.

    Raises:
      OSError: the cache cannot be written, e.g. because the disk is full, or an entry that was
        written cannot be read here.
    """
    entries: list[Path | OSError | None] = []
    for clip in clips:
        try:
            entries.append(cache.entry(clip))
        except OSError as error:
            entries.append(error)
    # Absolute: the nodes of a cluster have other working directories.
    calls = [
        (absolute(clip.location), clip.span, entry and entry.absolute(), cache.storage)
        for clip, entry in zip(clips, entries, strict=True)
        if not isinstance(entry, OSError)
    ]
    with contextlib.closing(map_calls(_decode, calls, timeout=timeout)) as results:
        for entry in entries:
            if isinstance(entry, OSError):
                yield WorkerFailure(one_line(entry), is_passing=True)
                continue
            result = next(results)
            if isinstance(result, OSError):
                raise result
            if result is None and (result := _read_entry(entry)) is None:
                raise OSError(errno.EIO, "the entry was written and cannot be read", str(entry))
            yield result


def _decode(
    location: Location, span: Span | None, entry: Path | None, storage: StorageSpec
) -> Frames | WorkerFailure | OSError | None:
    """Decodes a video into the cache unless it is there; without an entry, returns the frames.

    Returns what is wrong with the video or with the cache: an exception would be that of a video.
    """
    try:
        if entry is not None and _read_entry(entry) is not None:
            return None
        clock = storage.frame_clock
        frames: Frames = read_frames(location, storage.max_frames, storage.form, span, clock)
        if storage.encoding == "jpeg":
            frames = [encode_jpeg(frame) for frame in frames]
        if entry is None:
            return frames
        _write_entry(entry, frames)
    except VideoError as error:
        return WorkerFailure(str(error))
    except OSError as error:
        return error
    return None


def encode_jpeg(frame: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 3] as a JPEG file of quality 95."""
    file = io.BytesIO()
    # 4:4:4: chroma subsampling loses more than the step from quality 95 to 90.
    Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")
    return file.getvalue()
