"""Segments: the immutable parts of an index.

    videos.arrow     a row for each video, ordered by path
    AXIS.NAME.bin    an array: a row for each window, sampled frame, frame feature, or strip
    strips.bin       thumbnails: JPEG files, one after the other

A segment is written once, published whole, and never changed: readers map its files and take no
lock, and what they have mapped stays when the files are deleted.

Arrow trusts the offsets in a mapped file, so the hash of `videos.arrow` is checked when it is
opened. It has a checksum of the array rows of each video, which are checked when they are used.
"""

import bisect
import dataclasses
import functools
import itertools
import secrets
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from drl_jax.models.interactions import Features
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import publishing, sha256

AXES = ("window", "frame", "feature")
_TABLE, _STRIPS = "videos.arrow", "strips.bin"
_COUNTS = {f"{axis}s": axis for axis in (*AXES, "strip")}
# Fields of a record, in their order, and then what is computed of it.
_SCHEMA = pa.schema(
    [
        *(("path", pa.large_string()), ("size", pa.int64()), ("mtime_ns", pa.int64())),
        *(("sha256", pa.string()), ("error", pa.string())),
        *(("allowed", pa.float64()), ("duration", pa.float64())),
        *((name, pa.int32()) for name in _COUNTS),
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
      size: bytes.
      mtime_ns: modification time.
      sha256: of its content; empty if it was not read.
      error: why it cannot be searched; empty if it can.
      allowed: seconds that decoding could take, for a video whose decoding took longer; else 0.
      duration: seconds.
      arrays: by `AXIS.NAME`; none with an error. W windows: `window.span` float64 [W, 2], seconds,
        `window.frames` int32 [W, F], numbers of sampled frames or -1, and what the interaction
        compares. N sampled frames: `frame.time` float64 [N], seconds, and `frame.hash` uint64 [N].
        Of a file of several windows: `feature.image_feat` [N, D], as stored; of others [0, D].
      strips: JPEG files of STRIP_FRAMES thumbnails side by side.
      strip_crc32: their stored checksums, which are checked when they are shown.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str = ""
    error: str = ""
    allowed: float = 0.0
    duration: float = 0.0
    arrays: Mapping[str, np.ndarray] = {}
    strips: Sequence[bytes | np.ndarray] = ()
    strip_crc32: Sequence[int] = ()


class Segment:
    """An open segment.

    Attributes:
      directory: of the segment.
      entry: what `write_segment` returned.
      table: a row for each video.
      arrays: by `AXIS.NAME`, memory-mapped.
      firsts: by axis, the first row of each video and the number of all rows, int64 [V + 1].
      verified: bool [V], videos whose rows are checked.
    """

    def __init__(self, parent: Path, entry: Mapping[str, Any]):
        """Maps the files of `parent / entry["name"]`.

        Raises:
          OSError, ValueError: a file is missing, cut, or not what was written.
        """
        self.directory, self.entry = parent / entry["name"], entry
        path = self.directory / _TABLE
        self._check_table()
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema != _SCHEMA:
            raise ValueError(f"{path} has other columns")
        self.table = reader.get_batch(0)
        self.firsts = {
            axis: np.concatenate([[0], np.cumsum(self.column(name), dtype=np.int64)])
            for name, axis in _COUNTS.items()
        }
        self._sizes = {path: path.stat().st_size}
        self.arrays: Features = {}
        for name, (dtype, *shape) in entry["arrays"].items():
            rows = int(self.firsts[name.partition(".")[0]][-1])
            self.arrays[name] = self._map(f"{name}.bin", dtype, (rows, *shape))
        self._strip_edges = np.concatenate([[0], self.arrays["strip.end"]])
        self._strips = self._map(_STRIPS, "uint8", (int(self._strip_edges[-1]),))
        self.verified = np.zeros(len(self.table), bool)
        self._modified = [path.stat().st_mtime_ns for path in self._sizes]

    def _map(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        path, count = self.directory / name, int(np.prod(shape))
        self._sizes[path] = count * np.dtype(dtype).itemsize
        if path.stat().st_size != self._sizes[path]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, not {self._sizes[path]}")
        return np.memmap(path, dtype, "r", shape=shape) if count else np.zeros(shape, dtype)

    def _check_table(self) -> None:
        if sha256(self.directory / _TABLE) != self.entry["sha256"]:
            raise ValueError(f"{self.directory / _TABLE} differs from its hash")

    def __len__(self) -> int:
        return len(self.table)

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(self._sizes.values())

    def column(self, name: str) -> np.ndarray:
        """A column of numbers of the table, [V]."""
        return self.table.column(name).to_numpy()

    def path(self, row: int) -> str:
        """The path of a video."""
        return self.table.column("path")[row].as_py()

    def find(self, path: str) -> int | None:
        """The row of a video; None if it is not in the segment."""
        # As Arrow and Python compare them: by code points.
        row = bisect.bisect_left(range(len(self)), path, key=self.path)
        return row if row < len(self) and self.path(row) == path else None

    def row_of_window(self, window: int | np.ndarray) -> int | np.ndarray:
        """The row of the video that has a window."""
        return np.searchsorted(self.firsts["window"], window, side="right") - 1

    def read(self, row: int) -> VideoRecord:
        """A video; its arrays and strips are views of the files.

        Raises:
          ValueError: its rows are not what was written.
        """
        self.verify(row)
        (values,) = self.table.select(_FIELDS).slice(row, 1).to_pylist()
        first, last = self.firsts["strip"][row : row + 2]
        edges = itertools.pairwise(self._strip_edges[first : last + 1])
        strips = [self._strips[start:end] for start, end in edges]
        checksums = self.arrays["strip.crc32"][first:last].tolist()
        return VideoRecord(**values, arrays=self._rows(row), strips=strips, strip_crc32=checksums)

    def verify(self, row: int) -> None:
        """Checks the array rows of a video, once.

        Raises:
          ValueError: they are not what was written.
        """
        if not self.verified[row] and _crc32(self._rows(row)) != self.column("crc32")[row]:
            raise ValueError(f"the features of {self.path(row)!r} differ from their checksum")
        self.verified[row] = True

    def check_files(self) -> None:
        """Checks that no mapped file was cut: reading behind its end would end the process.

        Videos of files that were written to are checked again when they are used.

        Raises:
          ValueError: one was cut, or the table has changed.
        """
        try:
            found = {path: path.stat() for path in self._sizes}
            for path, status in found.items():
                if status.st_size < self._sizes[path]:
                    raise ValueError(f"{path} was cut")
            modified = [status.st_mtime_ns for status in found.values()]
            if modified != self._modified:
                self._check_table()
                self._modified, self.verified[:] = modified, False
        except FileNotFoundError:
            return  # A merge has deleted the segment, which stays mapped.

    def _rows(self, row: int) -> Features:
        """The array rows of a video; with an error, it has none."""
        rows = {axis: slice(*self.firsts[axis][row : row + 2]) for axis in AXES}
        if rows["frame"].start == rows["frame"].stop:
            return {}
        axes = ((name, name.partition(".")[0]) for name in self.arrays)
        return {name: self.arrays[name][rows[axis]] for name, axis in axes if axis in rows}

    def strip(self, row: int, number: int) -> bytes:
        """A JPEG file of thumbnails.

        Raises:
          ValueError: it is not what was written.
        """
        strip = self.firsts["strip"][row] + number
        jpeg = bytes(self._strips[slice(*self._strip_edges[strip : strip + 2])])
        if zlib.crc32(jpeg) != self.arrays["strip.crc32"][strip]:
            raise ValueError(f"the thumbnails of {self.path(row)!r} differ from their checksum")
        return jpeg


@dataclasses.dataclass(frozen=True, eq=False)
class Listed:
    """A segment in one state of an index.

    Attributes:
      segment: open.
      gone: bool [V], videos that were removed or replaced.
      prefix: what paths of the index have before those of the segment; "" but for joined indexes.
      first_slot: the number of its first window among all windows of the index.
    """

    segment: Segment
    gone: np.ndarray
    prefix: str = ""
    first_slot: int = 0

    @functools.cached_property
    def live(self) -> np.ndarray:
        """bool [V], videos that can be searched."""
        return ~self.gone & (self.segment.column("windows") > 0)

    def windows(self) -> int:
        """Number of windows of these videos."""
        return int(self.segment.column("windows")[self.live].sum())

    def errors(self) -> list[tuple[str, str]]:
        """Path of each file that cannot be searched, and why."""
        table = self.segment.table.select(["path", "error"])
        rows = table.take(np.flatnonzero(~self.gone & ~self.live)).to_pylist()
        return [(self.prefix + row["path"], row["error"]) for row in rows]


def write_segment(parent: Path, videos: Sequence[VideoRecord]) -> dict[str, Any]:
    """Writes and publishes a segment; nothing lists it yet.

    Args:
      parent: directory of the segments.
      videos: at least one; several have arrays of the same names, dtypes and row shapes.

    Returns:
      What `Segment` opens it by, as JSON values.

    Raises:
      OSError: it cannot be written.
    """
    name = secrets.token_hex(6)
    videos = sorted(videos, key=lambda video: video.path)
    searchable = [video.arrays for video in videos if video.arrays]
    strips = [strip for video in videos for strip in video.strips]
    checksums = [video.strip_crc32 or map(zlib.crc32, video.strips) for video in videos]
    of_strips = {
        "strip.end": np.cumsum([len(strip) for strip in strips], dtype=np.int64),
        "strip.crc32": np.fromiter(itertools.chain(*checksums), np.uint32, len(strips)),
    }
    layout = {}
    with publishing(parent / name) as directory:
        for array, rows in {**(searchable[0] if searchable else {}), **of_strips}.items():
            layout[array] = [rows.dtype.name, *rows.shape[1:]]
            parts = [rows] if array in of_strips else (arrays[array] for arrays in searchable)
            _write(directory / f"{array}.bin", parts)
        _write(directory / _STRIPS, (np.frombuffer(strip, np.uint8) for strip in strips))
        columns = {field: [getattr(video, field) for video in videos] for field in _FIELDS}
        for column, axis in _COUNTS.items():
            columns[column] = [_count(video, axis) for video in videos]
        columns["crc32"] = [_crc32(video.arrays) for video in videos]
        batch = pa.RecordBatch.from_pydict(columns, _SCHEMA)
        with pa.OSFile(str(directory / _TABLE), "wb") as out, pa.ipc.new_file(out, _SCHEMA) as file:
            file.write_batch(batch)
        digest = sha256(directory / _TABLE)
    return {"name": name, "sha256": digest, "videos": len(videos), "arrays": layout, "gone": []}


def _write(path: Path, parts: Iterable[np.ndarray]) -> None:
    with path.open("wb") as file:
        for rows in parts:
            file.write(np.ascontiguousarray(rows).data)


def _count(video: VideoRecord, axis: str) -> int:
    """Rows of a video on an axis."""
    if axis == "strip":
        return len(video.strips)
    return next((len(rows) for name, rows in video.arrays.items() if name.startswith(axis)), 0)


def _crc32(arrays: Mapping[str, np.ndarray]) -> int:
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).data, checksum)
    return checksum
