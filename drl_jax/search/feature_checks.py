"""Checks the rows of the arrays of an index against the checksums in its table of videos."""

import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.search.rows import COLUMNS, IndexedVideo, damaged, from_row


class StoredRows(NamedTuple):
    """The rows of a video in the arrays.

    Attributes:
      slot: the first one.
      checksums: of each; None if an older version stored it, which has one row.
      frames: of the video.
    """

    slot: int
    checksums: tuple[int, ...] | None
    frames: int

    @property
    def stop(self) -> int:
        """The slot behind the last one."""
        return self.slot + (1 if self.checksums is None else len(self.checksums))


def rows_of_video(video: IndexedVideo) -> StoredRows:
    """The rows of a video without an error."""
    return StoredRows(video.slot, video.checksums, len(video.times))


def rows_of_row(row: Sequence[Any]) -> StoredRows:
    """The same from a checked row of COLUMNS with a slot, whose times are not decoded."""
    checksums = row[COLUMNS.index("windows_crc32")]
    if checksums is None:
        return rows_of_video(from_row(row))
    return StoredRows(row[COLUMNS.index("slot")], tuple(json.loads(checksums)), 0)


class FeatureChecks:
    """Checks rows of some arrays; 0.3 seconds per gigabyte, about as long as a first query."""

    def __init__(self, arrays: Features):
        """Reads nothing.

        Args:
          arrays: stored arrays, one row per slot.
        """
        self._mask = arrays.get("frame_mask")
        self._rows = min((len(array) for array in arrays.values()), default=0)
        # The bytes of each array, in the order of their names, and the bytes of a row.
        self._views = [
            (memoryview(np.ascontiguousarray(arrays[name])).cast("B"), arrays[name][:1].nbytes)
            for name in sorted(arrays)
            if self._rows
        ]

    def is_damaged(self, rows: StoredRows) -> bool:
        """Whether rows have changed, or are not in the arrays."""
        if rows.stop > self._rows:
            return True
        if rows.checksums is None:
            # A model would explain frames without a time.
            mask = None if self._mask is None else self._mask[rows.slot]
            return mask is not None and bool((mask != (np.arange(len(mask)) < rows.frames)).any())
        found = map(self.crc32, range(rows.slot, rows.stop))
        return any(a != b for a, b in zip(found, rows.checksums, strict=True))

    def crc32(self, slot: int) -> int:
        """Checksum of a row of all arrays."""
        crc32 = 0
        for view, size in self._views:
            crc32 = zlib.crc32(view[slot * size : (slot + 1) * size], crc32)
        return crc32


def features_crc32(arrays: Features) -> list[int]:
    """Checksums of all rows of the arrays: one of each window."""
    checks = FeatureChecks(arrays)
    return [checks.crc32(row) for row in range(len(next(iter(arrays.values()))))]


def check_features(
    directory: Path, videos: Iterable[tuple[str, StoredRows]], checks: FeatureChecks
) -> None:
    """Checks the arrays of videos.

    Args:
      directory: of the index.
      videos: path and rows of each.
      checks: of the arrays of the index.

    Raises:
      SearchIndexError: the features of a video are damaged.
    """
    for path, rows in videos:
        if checks.is_damaged(rows):
            raise damaged(directory, f"the features of {path} have changed", can_heal=True)
