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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


def check_row(row: Sequence[Any]) -> None:
    """Checks the checksum of a row, and what one without checksum must have.

    Args:
      row: the values of COLUMNS.

    Raises:
      ValueError: it is damaged.
    """
    *values, crc32 = row
    path, size, mtime_ns, sha256, error, slot, times, *_ = values
    if crc32 is not None and crc32 != row_crc32(values):
        raise ValueError(f"the checksum of the row of {path} is wrong")
    if not all(isinstance(value, str) for value in (path, sha256, error, times)):
        raise ValueError(f"the row of {path} has no text where it must have")
    if not all(isinstance(value, int) for value in (size, mtime_ns)):
        raise ValueError(f"the row of {path} has no number where it must have")
    if (slot is None) != bool(error) or (slot is not None and slot < 0):
        raise ValueError(f"the slot of {path} is {slot}")


def from_row(row: Sequence[Any]) -> IndexedVideo:
    """Reads a row of the table of videos.

    Args:
      row: the values of COLUMNS.

    Raises:
      ValueError: it is damaged.
    """
    check_row(row)
    path, size, mtime_ns, sha256, error, slot, times, features, _, *added, _ = row
    duration, windows, checksums, allowed = added
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
    if not error and not parts:
        raise ValueError(f"{path} has no windows")
    return IndexedVideo(
        *(path, size, mtime_ns, sha256, error, slot, tuple(seconds), tuple(parts)),
        *(duration or 0.0, crc32s, allowed or 0.0),
    )


class KnownFile(NamedTuple):
    """What an update compares a file with: a row without times and windows.

    Attributes:
      path: relative to the folder of the videos.
      size: bytes.
      mtime_ns: modification time.
      sha256: of its content; empty if it could not be read.
      allowed: as `IndexedVideo.allowed`.
      is_damaged: whether its features are damaged or lost.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str
    allowed: float = 0.0
    is_damaged: bool = False


def known_file(row: Sequence[Any], *, is_damaged: bool) -> KnownFile:
    """What an update needs of a checked row of COLUMNS."""
    allowed = row[COLUMNS.index("allowed")]
    return KnownFile(*row[:4], allowed or 0.0, is_damaged)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
