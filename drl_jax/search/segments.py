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
import itertools
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from drl_jax.models.interactions import Features
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import publishing, sha256

AXES = ("window", "frame", "feature")
_TABLE, _STRIPS = "videos.arrow", "strips.bin"
# Columns that are fields of a record, in their order.
_FIELDS = ("path", "size", "mtime_ns", "sha256", "error", "allowed", "duration")
_SCHEMA = pa.schema(
    {
        "path": pa.large_string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "sha256": pa.string(),
        "error": pa.string(),
        "allowed": pa.float64(),
        "duration": pa.float64(),
        **{f"{axis}s": pa.int32() for axis in (*AXES, "strip")},
        "crc32": pa.uint32(),
    }
)


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
      table: a row for each video.
      arrays: by `AXIS.NAME`, memory-mapped.
      firsts: by axis, the first row of each video and the number of all rows, int64 [V + 1].
      verified: bool [V], videos whose rows are checked.
    """

    def __init__(self, parent: Path, entry: Mapping[str, Any]):
        """Maps the files.

        Args:
          parent: of the segment's directory.
          entry: what `write_segment` returned.

        Raises:
          OSError, ValueError: a file is missing, cut, or not what was written.
        """
        self.directory, self._entry = parent / entry["name"], entry
        self._check_table()
        path = self.directory / _TABLE
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema != _SCHEMA:
            raise ValueError(f"{path} has other columns")
        self.table = reader.get_batch(0)
        self.firsts = {
            axis: np.concatenate([[0], np.cumsum(self.column(f"{axis}s"), dtype=np.int64)])
            for axis in (*AXES, "strip")
        }
        self.arrays: Features = {}
        self._sizes = {path: path.stat().st_size}
        for name, (dtype, *shape) in entry["arrays"].items():
            rows = int(self.firsts[name.partition(".")[0]][-1])
            self.arrays[name] = self._map(f"{name}.bin", dtype, (rows, *shape))
        ends = self.arrays["strip.end"]
        self._strips = self._map(_STRIPS, "uint8", (int(ends[-1]) if len(ends) else 0,))
        self.verified = np.zeros(len(self.table), bool)
        self._state = self._modified()

    def _map(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        path, count = self.directory / name, int(np.prod(shape))
        self._sizes[path] = count * np.dtype(dtype).itemsize
        if path.stat().st_size != self._sizes[path]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, not {self._sizes[path]}")
        return np.memmap(path, dtype, "r", shape=shape) if count else np.zeros(shape, dtype)

    def _check_table(self) -> None:
        if sha256(self.directory / _TABLE) != self._entry["sha256"]:
            raise ValueError(f"{self.directory / _TABLE} differs from its hash")

    def _modified(self) -> list[int]:
        return [path.stat().st_mtime_ns for path in self._sizes]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(self._sizes.values())

    def column(self, name: str) -> np.ndarray:
        """A column of numbers of the table, [V]."""
        return self.table.column(name).to_numpy()

    def paths(self) -> list[str]:
        """The paths of all videos, in order."""
        return self.table.column("path").to_pylist()

    def find(self, path: str) -> int | None:
        """The row of a video; None if it is not in the segment."""
        paths = self.table.column("path")
        # As Arrow and Python compare them: by code points.
        row = bisect.bisect_left(range(len(paths)), path, key=lambda n: paths[n].as_py())
        return row if row < len(paths) and paths[row].as_py() == path else None

    def row_of_window(self, window: int | np.ndarray) -> int | np.ndarray:
        """The row of the video that has a window."""
        return np.searchsorted(self.firsts["window"], window, side="right") - 1

    def read(self, row: int, *, verify: bool = True) -> VideoRecord:
        """A video; its arrays and strips are views of the files.

        Raises:
          ValueError: its rows are not what was written.
        """
        if verify:
            self.verify(row)
        values = self.table.slice(row, 1).to_pylist()[0]
        fields = (values[name] for name in _FIELDS)
        checksums = self.arrays["strip.crc32"][slice(*self.firsts["strip"][row : row + 2])]
        return VideoRecord(*fields, self._rows(row), self._strips_of(row), checksums.tolist())

    def verify(self, row: int) -> None:
        """Checks the array rows of a video, once.

        Raises:
          ValueError: they are not what was written.
        """
        if self.verified[row]:
            return
        if _crc32(self._rows(row)) != self.table.column("crc32")[row].as_py():
            path = self.table.column("path")[row].as_py()
            raise ValueError(f"the features of {path!r} differ from their checksum")
        self.verified[row] = True

    def check_files(self) -> None:
        """Checks that no mapped file was cut: reading behind its end would end the process.

        Videos of files that were written to are checked again when they are used.

        Raises:
          ValueError: one was cut, or the table has changed.
        """
        try:
            for path, size in self._sizes.items():
                if path.stat().st_size < size:
                    raise ValueError(f"{path} was cut")
            modified = self._modified()
            if modified != self._state:
                self._check_table()
                self._state = modified
                self.verified[:] = False
        except FileNotFoundError:
            return  # A merge has deleted the segment, which stays mapped.

    def _rows(self, row: int) -> Features:
        """The array rows of a video; with an error, it has none."""
        if not self.firsts["frame"][row + 1] - self.firsts["frame"][row]:
            return {}
        rows = {axis: slice(*self.firsts[axis][row : row + 2]) for axis in AXES}
        return {
            name: array[rows[axis]]
            for name, array in self.arrays.items()
            if (axis := name.partition(".")[0]) in rows
        }

    def _strips_of(self, row: int) -> list[np.ndarray]:
        first, last = self.firsts["strip"][row : row + 2].tolist()
        ends = self.arrays["strip.end"]
        edges = [int(ends[first - 1]) if first else 0, *ends[first:last].tolist()]
        return [self._strips[start:end] for start, end in itertools.pairwise(edges)]

    def strip(self, row: int, number: int) -> bytes:
        """A JPEG file of thumbnails.

        Raises:
          ValueError: it is not what was written.
        """
        jpeg = bytes(self._strips_of(row)[number])
        if zlib.crc32(jpeg) != self.arrays["strip.crc32"][self.firsts["strip"][row] + number]:
            raise ValueError(f"the thumbnails of {self.table.column('path')[row].as_py()!r}")
        return jpeg


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
    searchable = [video for video in videos if video.arrays]
    layout = {
        array: [rows.dtype.name, *rows.shape[1:]]
        for array, rows in (searchable[0].arrays if searchable else {}).items()
    }
    strips = [strip for video in videos for strip in video.strips]
    of_strips = {
        "strip.end": np.cumsum([len(strip) for strip in strips], dtype=np.int64),
        "strip.crc32": np.array(
            [crc for video in videos for crc in _strip_crc32(video)], np.uint32
        ),
    }
    with publishing(parent / name) as directory:
        for array in layout:
            _write(directory / f"{array}.bin", (video.arrays[array] for video in searchable))
        for array, rows in of_strips.items():
            _write(directory / f"{array}.bin", [rows])
        _write(directory / _STRIPS, (np.frombuffer(strip, np.uint8) for strip in strips))
        columns = {name: [getattr(video, name) for video in videos] for name in _FIELDS}
        for axis in AXES:
            columns[f"{axis}s"] = [_count(video, axis) for video in videos]
        columns["strips"] = [len(video.strips) for video in videos]
        columns["crc32"] = [_crc32(video.arrays) for video in videos]
        batch = pa.RecordBatch.from_pydict(columns, _SCHEMA)
        with pa.OSFile(str(directory / _TABLE), "wb") as out, pa.ipc.new_file(out, _SCHEMA) as file:
            file.write_batch(batch)
        digest = sha256(directory / _TABLE)
    layout |= {array: [rows.dtype.name] for array, rows in of_strips.items()}
    return {"name": name, "sha256": digest, "videos": len(videos), "arrays": layout, "gone": []}


def _write(path: Path, parts: Iterator[np.ndarray] | Sequence[np.ndarray]) -> None:
    with path.open("wb") as file:
        for rows in parts:
            file.write(np.ascontiguousarray(rows).data)


def _strip_crc32(video: VideoRecord) -> Sequence[int]:
    return video.strip_crc32 or [zlib.crc32(strip) for strip in video.strips]


def _count(video: VideoRecord, axis: str) -> int:
    """Rows of a video in the arrays of an axis."""
    found = (len(rows) for name, rows in video.arrays.items() if name.startswith(f"{axis}."))
    return next(found, 0)


def _crc32(arrays: Mapping[str, np.ndarray]) -> int:
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).data, checksum)
    return checksum
