"""Rows of the table of videos, and the checksums that find damage of an index.

SQLite and the array files have no checksums of their own, and a damaged index would silently give
other answers. Since format 4, there is a CRC-32 of the header (in the header), of each row of the
table, of each row of the arrays, and of thumbnails. What older versions stored has none, and is not
checked. Format 5 has any number of windows in a video; a video of format 4 has one.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.runtime.errors import UserError
from drl_jax.search.windows import Window

# Of the table of videos, without thumbnails.
COLUMNS = (
    *("path", "size", "mtime_ns", "sha256", "error", "slot", "times"),
    *("features_crc32", "thumbnails_crc32"),
    *("duration", "windows", "windows_crc32", "allowed"),
    "row_crc32",
)
# Columns that older formats lack, and their types. Format 5 stores the checksums of windows in
# `windows_crc32` and those of thumbnails beside them, instead of the two of format 4.
ADDED_COLUMNS = {
    "features_crc32": "INTEGER",
    "thumbnails_crc32": "INTEGER",
    "row_crc32": "INTEGER",
    "duration": "REAL",
    "windows": "TEXT",
    "windows_crc32": "TEXT",
    "allowed": "REAL",
}
_HEADER_TYPES = {
    "source": dict,
    "fingerprint": str,
    "videos": str,
    "storage": str,
    "arrays": dict,
    "generation": int,
    "next_slot": int,
    "obsolete_files": list,
}


class SearchIndexError(UserError):
    """An index that is missing, in use, damaged, or of another model."""


def damaged(directory: Path, what: object, *, can_heal: bool = False) -> SearchIndexError:
    """The error of an index that cannot be trusted.

    Args:
      directory: of the index.
      what: is wrong.
      can_heal: whether an update decodes the damaged videos again.
    """
    reason = " ".join(ascii(str(what))[1:-1].split())[:120]
    remedy = (
        "index the videos again, and only the damaged ones are decoded"
        if can_heal
        else "delete it and index the videos again"
    )
    return SearchIndexError(f"the index {directory} is damaged ({reason}); {remedy}")


@dataclasses.dataclass(frozen=True)
class IndexedVideo:
    """A video file of an index.

    Attributes:
      path: relative to the folder of the videos.
      size: bytes.
      mtime_ns: modification time.
      sha256: of its content; empty if it could not be read.
      error: why it cannot be searched; empty if it can.
      slot: the row of its first window in the arrays, which the others follow; None with an error.
      times: times of its frames, seconds from the start.
      windows: its parts, one for each of its rows in the arrays.
      duration: seconds; 0 if an older version stored it.
      checksums: of its rows in the arrays; None if an older version stored it.
      allowed: seconds that decoding could take, for a video whose decoding took longer; else 0.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str
    error: str = ""
    slot: int | None = None
    times: tuple[float, ...] = ()
    windows: tuple[Window, ...] = ()
    duration: float = 0.0
    checksums: tuple[int, ...] | None = None
    allowed: float = 0.0

    @property
    def length(self) -> float:
        """Seconds; to its last frame if an older version stored it."""
        return self.duration or max((window.end for window in self.windows), default=0.0)

    @property
    def slots(self) -> range:
        """Rows of its windows in the arrays."""
        return range(0) if self.slot is None else range(self.slot, self.slot + len(self.windows))


# ---------------------------------------------------------------- checksums


def header_crc32(header: Mapping[str, Any]) -> int:
    """Checksum of a header, without its own field `crc32`."""
    values = {name: value for name, value in header.items() if name != "crc32"}
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def check_header(header: Mapping[str, Any], *, rows: int) -> None:
    """Checks a header of format 3 or later.

    Args:
      header: as stored.
      rows: number of rows of the table of videos.

    Raises:
      ValueError: it is damaged.
    """
    if ("crc32" in header or header["format"] > 3) and header.get("crc32") != header_crc32(header):
        raise ValueError("the checksum of its header is wrong")
    for name, kind in _HEADER_TYPES.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(f"its header has no {name}")
    if header.get("rows", rows) != rows:
        raise ValueError(f"it lists {rows} of {header['rows']} videos")


def features_crc32(arrays: Features) -> list[int]:
    """Checksums of all rows of the arrays: one of each window."""
    views = _views(arrays)
    return [_row_crc32_of(views, row) for row in range(len(next(iter(arrays.values()))))]


def check_features(
    directory: Path, videos: Sequence[IndexedVideo], arrays: Features, *, first_slot: int = 0
) -> None:
    """Checks the arrays of videos: 0.3 seconds per gigabyte, about as long as a first query.

    Args:
      directory: of the index.
      videos: without errors.
      arrays: stored arrays, one row per slot.
      first_slot: rows before this one were checked before.

    Raises:
      SearchIndexError: the features of a video are damaged.
    """
    views = _views(arrays)
    for video in videos:
        if video.slot >= first_slot and _is_damaged(arrays, views, video):
            raise damaged(directory, f"the features of {video.path} have changed", can_heal=True)


def damaged_features(arrays: Features, videos: Sequence[IndexedVideo]) -> set[str]:
    """Paths of videos without errors whose rows are damaged, or are not in the arrays."""
    rows = min((len(array) for array in arrays.values()), default=0)
    if not rows:
        return {video.path for video in videos}
    views = _views(arrays)
    return {
        video.path
        for video in videos
        if video.slots.stop > rows or _is_damaged(arrays, views, video)
    }


def _is_damaged(arrays: Features, views: "_Views", video: IndexedVideo) -> bool:
    if video.checksums is None:
        mask = arrays.get("frame_mask")
        return mask is not None and not _is_mask_of(mask[video.slot], len(video.times))
    found = (_row_crc32_of(views, slot) for slot in video.slots)
    return any(a != b for a, b in zip(found, video.checksums, strict=True))


# The bytes of each array, and the bytes of a row.
_Views = list[tuple[memoryview, int]]


def _views(arrays: Features) -> _Views:
    """The bytes of each array, in the order of their names, and the bytes of a row."""
    return [
        (memoryview(np.ascontiguousarray(arrays[name])).cast("B"), arrays[name][:1].nbytes)
        for name in sorted(arrays)
    ]


def _row_crc32_of(views: _Views, row: int) -> int:
    crc32 = 0
    for view, size in views:
        crc32 = zlib.crc32(view[row * size : (row + 1) * size], crc32)
    return crc32


def _is_mask_of(mask: np.ndarray, frames: int) -> bool:
    """Whether a mask is that of so many frames; a model would explain others without a time."""
    return bool((mask == (np.arange(len(mask)) < frames)).all())


# ---------------------------------------------------------------- rows


def to_row(video: IndexedVideo, slot: int | None, checksums: Sequence[int]) -> tuple[Any, ...]:
    """The values of COLUMNS for a video.

    Args:
      video: without slot and checksums.
      slot: its first slot; None with an error.
      checksums: of its rows in the arrays.
    """
    row = (
        *(video.path, video.size, video.mtime_ns, video.sha256, video.error, slot),
        *(json.dumps(video.times), None, None, video.duration),
        *(json.dumps(video.windows), json.dumps(list(checksums)), video.allowed),
    )
    return (*row, row_crc32(row))


def row_crc32(row: Sequence[Any]) -> int:
    """Checksum of the values of COLUMNS but the last; without the slot, which `compact` changes.

    A wrong slot has features with another checksum. Format 4 has no windows.
    """
    end = 9 if row[COLUMNS.index("windows")] is None else len(COLUMNS) - 1
    return zlib.crc32(ascii((*row[:5], *row[6:end])).encode())


def from_row(row: Sequence[Any]) -> IndexedVideo:
    """Reads a row of the table of videos.

    Args:
      row: the values of COLUMNS.

    Raises:
      ValueError: it is damaged.
    """
    *values, crc32 = row
    path, size, mtime_ns, sha256, error, slot, times, features, _, *added = values
    duration, windows, checksums, allowed = added
    if crc32 is not None and crc32 != row_crc32(values):
        raise ValueError(f"the checksum of the row of {path} is wrong")
    if not all(isinstance(value, str) for value in (path, sha256, error, times)):
        raise ValueError(f"the row of {path} has no text where it must have")
    if not all(isinstance(value, int) for value in (size, mtime_ns)):
        raise ValueError(f"the row of {path} has no number where it must have")
    seconds = json.loads(times)
    if not isinstance(seconds, list) or not all(map(_is_finite, seconds)):
        raise ValueError(f"the times of {path} are not numbers")
    if windows is None:  # Format 4 or older: one window, of all frames.
        whole = Window(0.0, max(seconds, default=0.0), tuple(range(len(seconds))))
        parts = [] if error else [whole]
        crc32s = None if features is None else (features,)
    else:
        parts = [Window(start, end, tuple(frames)) for start, end, frames in json.loads(windows)]
        crc32s = tuple(json.loads(checksums))
        if len(crc32s) != len(parts):
            raise ValueError(f"{path} has {len(parts)} windows and {len(crc32s)} checksums")
    if (slot is None) != bool(error):
        raise ValueError(f"the slot of {path} is {slot}")
    if not error and not (slot >= 0 and parts):
        raise ValueError(f"the slot of {path} is {slot}")
    return IndexedVideo(
        *(path, size, mtime_ns, sha256, error, slot, tuple(seconds), tuple(parts)),
        *(duration or 0.0, crc32s, allowed or 0.0),
    )


class ListedVideo(NamedTuple):
    """What filters need of a video.

    Attributes:
      slot: as `IndexedVideo.slot`.
      path: relative to the folder of the videos.
      mtime_ns: modification time.
      length: seconds; to its last frame if an older version stored it.
    """

    slot: int
    path: str
    mtime_ns: int
    length: float


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
