"""The files of an index: what is indexed in `index.sqlite`, features in one file an array.

A video has a slot, the same row of every array. Slots are never overwritten while a video has them:
features go to a free slot, and one transaction then makes them the video's. So whatever kills a
writer, an index is as it was before or after each change.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from drl_jax.models.interaction import Features
from drl_jax.runtime.errors import UserError

_DATABASE = "index.sqlite"
_FORMAT = 2
# How features are stored; masks and weights are stored as they are.
STORAGES = ("bfloat16", "int8", "float32")
# Rows that an array's file grows by.
_GROWTH = 256
_SCHEMA = """
CREATE TABLE IF NOT EXISTS header (value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS videos (
  path TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
  error TEXT NOT NULL, slot INTEGER UNIQUE, times TEXT NOT NULL, thumbnails BLOB
);
"""


class SearchIndexError(UserError):
    """An index that is absent, in use, or of another model."""


@dataclasses.dataclass(frozen=True)
class IndexedVideo:
    """A file that an index knows.

    Attributes:
      path: below the folder of the videos.
      size: bytes.
      mtime_ns: when it was last changed.
      sha256: of its content; empty if it could not be read.
      error: why it cannot be searched; empty if it can.
      slot: its row of the arrays; None with an error.
      times: seconds from its start at which its frames are shown.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str
    error: str = ""
    slot: int | None = None
    times: tuple[float, ...] = ()


class Store:
    """An index on disk; use it in a `with` block."""

    def __init__(self, directory: Path, *, write: bool = False):
        """Opens an index; with `write`, creates the directory and keeps other writers out.

        Raises:
          SearchIndexError: there is none to read, or another process writes to it.
        """
        self.directory = directory
        self._lock = None
        database = directory / _DATABASE
        if write:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._lock = (directory / "lock").open("w")
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SearchIndexError(
                    f"another process writes to the index {directory}"
                ) from error
            except OSError as error:
                raise SearchIndexError(
                    f"cannot write to --index={directory}: {error.strerror}"
                ) from error
        elif not database.is_file():
            raise SearchIndexError(
                f"no index in {directory}; make one with: python -m drl_jax.search index"
                f" --workdir=RUN --videos=DIR --index={directory}"
            )
        try:
            self._database = sqlite3.connect(database)
            if write:
                self._database.executescript(_SCHEMA)
            row = self._database.execute("SELECT value FROM header").fetchone()
        except sqlite3.DatabaseError as error:
            raise SearchIndexError(f"{database} is not an index ({error})") from error
        self.header: dict[str, Any] = json.loads(row[0]) if row else {}
        if self.header and self.header["format"] != _FORMAT:
            raise SearchIndexError(f"{directory} is of another version; delete it and index again")

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self._database.close()
        if self._lock:
            self._lock.close()

    def set_header(self, header: Mapping[str, Any]) -> None:
        """Stores what an index is made of; "storage" is one of STORAGES."""
        self.header = {"format": _FORMAT, **header}
        with self._writing(), self._database:
            self._database.execute("DELETE FROM header")
            self._database.execute("INSERT INTO header VALUES (?)", (json.dumps(self.header),))

    # ------------------------------------------------------------------ videos

    def videos(self) -> list[IndexedVideo]:
        """Every file, in the order of paths."""
        rows = self._database.execute(
            "SELECT path, size, mtime_ns, sha256, error, slot, times FROM videos ORDER BY path"
        )
        return [IndexedVideo(*row[:6], tuple(json.loads(row[6]))) for row in rows]

    def thumbnails(self, path: str) -> bytes:
        """A JPEG file with the frames of a video side by side; empty where there are none."""
        rows = self._database.execute("SELECT thumbnails FROM videos WHERE path = ?", (path,))
        return next(rows, (None,))[0] or b""

    def put(
        self, videos: Sequence[IndexedVideo], features: Features, thumbnails: Sequence[bytes]
    ) -> None:
        """Adds or replaces videos.

        Args:
          videos: of those without an error, `slot` is chosen here.
          features: for each name, the rows of the videos without an error, in order.
          thumbnails: of the same.
        """
        usable = [video for video in videos if not video.error]
        slots = self._free_slots(len(usable))
        with self._writing():
            for name, rows in stored_arrays(features, self.header["storage"]).items():
                self._write_rows(name, rows, slots)
        strips = dict(zip((video.path for video in usable), thumbnails, strict=True))
        slot_of = dict(zip((video.path for video in usable), slots, strict=True))
        with self._writing(), self._database:
            self._database.executemany(
                "INSERT OR REPLACE INTO videos VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(video.path, video.size, video.mtime_ns, video.sha256, video.error),
                        *(slot_of.get(video.path), json.dumps(video.times)),
                        strips.get(video.path),
                    )
                    for video in videos
                ],
            )

    def touch(self, video: IndexedVideo) -> None:
        """Notes that a file has another time of change and the same content."""
        with self._writing(), self._database:
            self._database.execute(
                "UPDATE videos SET mtime_ns = ? WHERE path = ?", (video.mtime_ns, video.path)
            )

    def remove(self, paths: Sequence[str]) -> None:
        """Forgets videos; their slots become free."""
        with self._writing(), self._database:
            self._database.executemany(
                "DELETE FROM videos WHERE path = ?", [(path,) for path in paths]
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk, or one that fails, as one line; what was stored before is as it was."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            raise SearchIndexError(
                f"cannot write to the index {self.directory}"
                f" ({getattr(error, 'strerror', None) or error}); when that is mended, the same"
                " command goes on"
            ) from error

    # ------------------------------------------------------------------ arrays

    def arrays(self) -> Features:
        """The stored arrays, memory-mapped, with a row a slot, free ones included.

        `NAME.scale` belongs to an int8 array; see `stored_arrays`.
        """
        described = self.header.get("arrays", {})
        return {
            name: np.memmap(self._file(name), array["dtype"], "r").reshape(-1, *array["shape"])
            for name, array in described.items()
        }

    def nbytes(self) -> int:
        """Bytes of all arrays on disk."""
        return sum(self._file(name).stat().st_size for name in self.header.get("arrays", {}))

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.bin"

    def _free_slots(self, count: int) -> list[int]:
        rows = self._database.execute("SELECT slot FROM videos WHERE slot IS NOT NULL")
        taken = {slot for (slot,) in rows}
        free, slot = [], 0
        while len(free) < count:
            if slot not in taken:
                free.append(slot)
            slot += 1
        return free

    def _write_rows(self, name: str, rows: np.ndarray, slots: Sequence[int]) -> None:
        if not slots:
            return
        row_bytes = rows[0].nbytes
        with self._file(name).open("r+b" if self._file(name).exists() else "w+b") as file:
            end = -(-(max(slots) + 1) // _GROWTH) * _GROWTH * row_bytes
            if file.seek(0, 2) < end:
                file.truncate(end)  # a hole: no bytes on disk until they are written
            for slot, row in zip(slots, rows, strict=True):
                file.seek(slot * row_bytes)
                file.write(np.ascontiguousarray(row).tobytes())
            file.flush()
            os.fsync(file.fileno())  # before the transaction that names the slots
        described = self.header.get("arrays", {})
        if name not in described:
            form = {"dtype": rows.dtype.name, "shape": list(rows.shape[1:])}
            self.set_header({**self.header, "arrays": {**described, name: form}})


def database_version(directory: Path) -> tuple[int, int]:
    """Another one after each change to an index."""
    try:
        status = (directory / _DATABASE).stat()
    except OSError:
        return (0, 0)
    return status.st_mtime_ns, status.st_size


def stored_arrays(features: Features, storage: str) -> Features:
    """Features in the form that they are stored in.

    int8 keeps for each vector (the last axis) a scale, so that `NAME * NAME.scale[..., None]` is
    within 1/254 of the vector's largest channel.
    """
    stored: Features = {}
    for name, array in features.items():
        if not name.endswith("_feat") or storage == "float32":
            stored[name] = array
        elif storage == "bfloat16":
            stored[name] = array.astype(ml_dtypes.bfloat16).view(np.uint16)
        else:
            largest = np.abs(array).max(axis=-1).astype(np.float32)
            scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
            stored[name] = np.rint(array / scale[..., None]).astype(np.int8)
            stored[f"{name}.scale"] = scale
    return stored
