"""Segments: the immutable parts of an index.

    videos.arrow     a row for each video, ordered by path
    AXIS.NAME.bin    an array: a row for each window, sampled frame, frame feature, strip of
                     thumbnails, or byte of these

A segment is published whole and never changed: readers map its files and take no lock, and what
they have mapped stays when the files are deleted. Arrow trusts the offsets in a mapped file, so the
hash of `videos.arrow` is checked on opening. It has a checksum of the array rows of each video,
which is checked on use; each strip has its own.
"""

import bisect
import dataclasses
import functools
import math
import secrets
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from drl_jax.models.interactions import Features
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import publishing, sha256

_AXES = ("window", "frame", "feature", "strip", "byte")
_TABLE = "videos.arrow"
# Fields of a record, in their order; rows of a video in the arrays; the checksum of these.
_SCHEMA = pa.schema(
    [
        *(("path", pa.large_string()), ("size", pa.int64()), ("mtime_ns", pa.int64())),
        *(("sha256", pa.string()), ("error", pa.string())),
        *(("allowed", pa.float64()), ("duration", pa.float64())),
        *((f"{axis}s", pa.int64()) for axis in _AXES),
        ("crc32", pa.uint32()),
    ]
)
_FIELDS = _SCHEMA.names[:7]


class SearchIndexError(UserError):
    """An index that is missing, damaged, in use, or of another model."""


class VideoRecord(NamedTuple):
    """What an index has of a video file.

    Attributes:
      path: relative to the folder of the videos.
      sha256: of its content; empty if it was not read.
      error: why it cannot be searched; empty if it can.
      allowed: seconds that decoding could take, for a video whose decoding took longer; else 0.
      arrays: by `AXIS.NAME`; none with an error. W windows: `window.span` float64 [W, 2], seconds,
        `window.frames` int32 [W, F], numbers of sampled frames or -1, and what the interaction
        compares. N sampled frames: `frame.time` float64 [N], seconds, and `frame.hash` uint64 [N].
        `feature.image_feat` as stored, [N, D]; [0, D] of one window. S strips of STRIP_FRAMES
        thumbnails: JPEG files in `byte.strip` uint8, `strip.end` int64, `strip.crc32` uint32 [S].
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str = ""
    error: str = ""
    allowed: float = 0.0
    duration: float = 0.0
    arrays: Mapping[str, np.ndarray] = {}

    def strip(self, number: int) -> bytes:
        """A JPEG file of thumbnails; raises a ValueError if it is damaged."""
        ends = self.arrays["strip.end"]
        start = ends[number - 1] if number else 0
        jpeg = self.arrays["byte.strip"][start : ends[number]].tobytes()
        if zlib.crc32(jpeg) != self.arrays["strip.crc32"][number]:
            raise ValueError(f"the thumbnails of {self.path!r} differ from their checksum")
        return jpeg


class Segment:
    """An open segment of V videos, with the `entry` that `write_segment` returned.

    Attributes:
      arrays: by `AXIS.NAME`, memory-mapped.
      firsts: by axis, the first row of each video and the number of all rows, int64 [V + 1].
      verified: bool [V], videos whose rows are checked.
    """

    def __init__(self, parent: Path, entry: Mapping[str, Any]):
        """Maps the files; raises an OSError or a ValueError if one is missing or damaged."""
        self.directory, self.entry = parent / entry["name"], entry
        path = self.directory / _TABLE
        self._states = {path: _state_of(path)}
        self._check_table()
        self.table = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        self.firsts = {
            axis: np.concatenate([[0], np.cumsum(self.column(f"{axis}s"), dtype=np.int64)])
            for axis in _AXES
        }
        self.arrays: Features = {}
        for name, (dtype, *row_shape) in entry["arrays"].items():
            shape = (int(self.firsts[_axis_of(name)][-1]), *row_shape)
            path = self.directory / f"{name}.bin"
            expected = math.prod(shape) * np.dtype(dtype).itemsize
            self._states[path] = size, _ = _state_of(path)
            if size != expected:
                raise ValueError(f"{path} has {size} bytes, not {expected}")
            mapped = np.memmap(path, dtype, "r", shape=shape) if size else np.zeros(shape, dtype)
            self.arrays[name] = mapped
        self.window_count = int(self.firsts["window"][-1])
        self.verified = np.zeros(len(self.table), bool)

    def _check_table(self) -> None:
        if sha256(self.directory / _TABLE) != self.entry["sha256"]:
            raise ValueError(f"{self.directory / _TABLE} differs from its hash")

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers of the table, [V]."""
        # `to_numpy` imports pandas where it is installed, which takes a quarter of a second.
        return np.from_dlpack(self.table.column(name))

    def path(self, row: int) -> str:
        return self.table.column("path")[row].as_py()

    def find(self, path: str) -> int | None:
        """The row of a video; None if it is not in the segment."""
        # As Arrow and Python compare them: by code points.
        row = bisect.bisect_left(range(len(self)), path, key=self.path)
        return row if row < len(self) and self.path(row) == path else None

    def row_of_window(self, window: int | np.ndarray) -> int | np.ndarray:
        return np.searchsorted(self.firsts["window"], window, side="right") - 1

    def read(self, row: int) -> VideoRecord:
        """A verified video; its arrays are views of the files."""
        self.verify(row)
        (values,) = self.table.select(_FIELDS).slice(row, 1).to_pylist()
        return VideoRecord(**values, arrays=self._rows(row))

    def verify(self, row: int) -> None:
        """Checks the array rows of a video, once; raises a ValueError if they are damaged."""
        if not self.verified[row] and _crc32(self._rows(row)) != self.column("crc32")[row]:
            raise ValueError(f"the features of {self.path(row)!r} differ from their checksum")
        self.verified[row] = True

    def check_files(self) -> None:
        """Raises a ValueError if a file was cut, or the table has changed."""
        try:
            states = {path: _state_of(path) for path in self._states}
            for path, (size, _) in states.items():
                if size < self._states[path][0]:  # Reading behind its end ends the process.
                    raise ValueError(f"{path} was cut")
            if states != self._states:
                self._check_table()
                self._states, self.verified[:] = states, False
        except FileNotFoundError:
            return  # A merge has deleted the segment, which stays mapped.

    def _rows(self, row: int) -> Features:
        """The array rows of a video; with an error, it has none."""
        rows = {axis: slice(*firsts[row : row + 2]) for axis, firsts in self.firsts.items()}
        if rows["frame"].start == rows["frame"].stop:
            return {}
        return {name: array[rows[_axis_of(name)]] for name, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Listed:
    """A segment in one state of an index."""

    segment: Segment
    gone: np.ndarray  # bool [V], videos that were removed or replaced.
    prefix: str = ""  # Of its paths, in a joined index.
    first_slot: int = 0  # Number of its first window among all of the index.

    @functools.cached_property
    def live(self) -> np.ndarray:
        """bool [V], videos that can be searched."""
        return ~self.gone & (self.segment.column("windows") > 0)

    def errors(self) -> list[tuple[str, str]]:
        """Path of each file that cannot be searched, and why."""
        table = self.segment.table.select(["path", "error"])
        rows = table.take(np.flatnonzero(~self.gone & ~self.live)).to_pylist()
        return [(self.prefix + row["path"], row["error"]) for row in rows]


def write_segment(parent: Path, videos: Sequence[VideoRecord]) -> dict[str, Any]:
    """Publishes a segment of videos with alike arrays; returns the JSON `entry` of `Segment`."""
    name, videos = secrets.token_hex(6), sorted(videos, key=lambda video: video.path)
    searchable = [video.arrays for video in videos if video.arrays]
    arrays = {array: [rows[array] for rows in searchable] for array in (searchable or [{}])[0]}
    columns = {field: [getattr(video, field) for video in videos] for field in _FIELDS}
    columns |= {f"{axis}s": [_count(video.arrays, axis) for video in videos] for axis in _AXES}
    columns["crc32"] = [_crc32(video.arrays) for video in videos]
    with publishing(parent / name) as directory:
        for array, parts in arrays.items():
            with (directory / f"{array}.bin").open("wb") as file:
                for part in parts:
                    file.write(np.ascontiguousarray(part).data)
        with pa.ipc.new_file(str(directory / _TABLE), _SCHEMA) as table:
            table.write(pa.RecordBatch.from_pydict(columns, _SCHEMA))
        digest = sha256(directory / _TABLE)
    layout = {array: [rows[0].dtype.name, *rows[0].shape[1:]] for array, rows in arrays.items()}
    return {"name": name, "sha256": digest, "videos": len(videos), "arrays": layout, "gone": []}


def _axis_of(array: str) -> str:
    return array.partition(".")[0]


def _count(arrays: Mapping[str, np.ndarray], axis: str) -> int:
    return next((len(rows) for name, rows in arrays.items() if _axis_of(name) == axis), 0)


def _crc32(arrays: Mapping[str, np.ndarray]) -> int:
    """Of all arrays but the bytes of thumbnails: most are never shown."""
    checksum = 0
    for name in sorted(arrays):
        if _axis_of(name) != "byte":
            checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).data, checksum)
    return checksum


def _state_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
