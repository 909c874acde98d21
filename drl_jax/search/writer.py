"""Writing a search index: adding, renaming and removing videos, and removing unused slots.

`store.py` describes the files and what a writer may do to them.
"""

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.runtime.lock import locked
from drl_jax.search.array_files import GROWTH, copy_rows, write_rows
from drl_jax.search.compared_store import ComparedStore
from drl_jax.search.database import (
    add_strips,
    count_rows,
    count_windows,
    forget_removed,
    keep_slots_of,
    remove_videos,
    replace_videos,
    select_video,
    update_slots,
)
from drl_jax.search.database_file import lock_path, transaction, upgrade
from drl_jax.search.feature_checks import features_crc32
from drl_jax.search.header import FORMAT, SHARD_FORMAT, header_crc32
from drl_jax.search.joined import is_joined, part_directories
from drl_jax.search.quantization import quantize
from drl_jax.search.rows import (
    ADDED_COLUMNS,
    COLUMNS,
    IndexedVideo,
    SearchIndexError,
    row_crc32,
    to_row,
)
from drl_jax.search.slots import slots_of_windows

# `compact` copies the arrays if more than this share of the slots, and `GROWTH` slots, are unused.
_MAX_UNUSED = 0.25
# Header of an index without videos; `update_header` adds the rest.
_NEW_HEADER = {
    "arrays": {},
    "generation": 0,
    "next_slot": 0,
    "obsolete_files": [],
}


class IndexWriter(ComparedStore):
    """An index that this process alone writes; a context manager.

    Attributes:
      directory: of the index.
      header: what the index was made with; empty for a new index.
    """

    def __init__(self, directory: Path):
        """Opens an index for writing; creates it if there is none.

        Args:
          directory: of the index.

        Raises:
          SearchIndexError: it is damaged, is a joined index, or cannot be written.
          LockError: another process writes to it.
        """
        if is_joined(directory):
            raise SearchIndexError(
                f"the index {directory} joins others; update these instead, each with its own"
                f" --index: {' '.join(map(str, part_directories(directory)))}"
            )
        self._spool = directory / "spool"
        self._lock = contextlib.ExitStack()
        try:
            self._lock.enter_context(locked(lock_path(directory), f"the index {directory}"))
        except OSError as error:
            raise SearchIndexError(
                f"cannot write to --index={directory}: {error.strerror}"
            ) from error
        self._open(directory, write=True)
        self._delete_obsolete_files()
        shutil.rmtree(self._spool, ignore_errors=True)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self._spool.exists():
            shutil.rmtree(self._spool, ignore_errors=True)
        self._lock.close()

    def update_header(self, **changes: Any) -> None:
        """Changes fields of the header, in one transaction.

        A new index needs: `source` and `fingerprint` of its model, `videos` (folder of the videos)
        and `storage` (one of `drl_jax.search.STORAGES`).
        """
        with self._transaction(**changes):
            pass

    def put(
        self, videos: Sequence[IndexedVideo], features: Features, strips: Mapping[str, list[bytes]]
    ) -> None:
        """Adds or replaces videos, in one transaction.

        Args:
          videos: their slots are chosen here.
          features: arrays; the rows of the windows of all videos, in order.
          strips: JPEG files with the frames of a video, by its path.
        """
        first, arrays = self.header["next_slot"], self.header["arrays"]
        end, checksums = first, []
        if any(video.windows for video in videos):
            rows = quantize(features, self.header["storage"])
            checksums = features_crc32(rows)
            with self._writing():
                arrays = write_rows(self.directory, arrays, self.header["generation"], rows, first)
        table = []
        for video in videos:
            of_video = checksums[end - first : end - first + len(video.windows)]
            row = to_row(video, None if video.error else end, of_video)
            table.append((*row, None if video.error else len(video.windows)))
            end += len(video.windows)
        with self._transaction(arrays=arrays, next_slot=end):
            self._remove([video.path for video in videos])
            replace_videos(self._database, (*COLUMNS, "window_count"), table)
            self._added_rows += len(videos)
            self._added_windows += end - first
            for path, jpegs in strips.items():
                add_strips(self._database, path, jpegs)

    def recount(self) -> None:
        """Counts the windows again: earlier versions change an index without counting them."""
        with self._reading():
            windows = count_windows(self._database)
        if windows != self.header["windows"]:
            self.update_header(windows=windows)

    def spool_file(self, number: int) -> Path:
        """A file for the frames of a long video until they are encoded; the folder exists."""
        with self._writing():
            self._spool.mkdir(exist_ok=True)
        return self._spool / f"{number}.frames"

    def rename(self, old: str, video: IndexedVideo) -> None:
        """Gives the features of a video that is gone to a file with the same content.

        Args:
          old: path of the video that is gone.
          video: the file; its path, size and modification time are used. A video that had this path
            is removed.
        """
        with self._transaction():
            self._remove([video.path])
            self._describe(old, video)
            self._database.execute("UPDATE strips SET path = ? WHERE path = ?", (video.path, old))

    def touch(self, video: IndexedVideo) -> None:
        """Stores a new modification time of a file with unchanged content."""
        with self._transaction():
            self._describe(video.path, video)

    def _describe(self, old: str, video: IndexedVideo) -> None:
        """Changes path, size and modification time of a row."""
        *row, crc32 = select_video(self._database, old, COLUMNS)
        new = {"path": video.path, "size": video.size, "mtime_ns": video.mtime_ns}
        for name, value in new.items():
            row[COLUMNS.index(name)] = value
        self._database.execute(
            "UPDATE videos SET path = ?, size = ?, mtime_ns = ?, row_crc32 = ? WHERE path = ?",
            (*new.values(), None if crc32 is None else row_crc32(row), old),
        )

    def remove(self, paths: Sequence[str]) -> None:
        """Removes videos, in one transaction."""
        if paths:
            with self._transaction():
                self._remove(paths)

    def _remove(self, paths: Sequence[str]) -> None:
        videos, windows = remove_videos(self._database, paths, self.header["generation"], COLUMNS)
        self._added_rows -= videos
        self._added_windows -= windows

    def compact(self) -> None:
        """Removes unused slots from the arrays if there are many; see the module's docstring.

        Reads the videos only then.
        """
        if not self._has_many_unused():
            return
        first, counts = self.slots()
        used = slots_of_windows(first, counts)
        if len(used) != self.header["windows"]:  # Another version of this program was here.
            self.update_header(windows=len(used))
            if not self._has_many_unused():
                return
        generation = self.header["generation"] + 1
        with self._writing():
            arrays = copy_rows(self.directory, self.header["arrays"], generation, used)
        old_files = [array["file"] for array in self.header["arrays"].values()]
        with self._transaction(
            arrays=arrays, generation=generation, next_slot=len(used), obsolete_files=old_files
        ):
            keep_slots_of(self._database, generation - 1, COLUMNS)
            # In increasing order, so that each new slot is free.
            new = np.cumsum(counts) - counts
            update_slots(self._database, first.tolist(), new.tolist())

    def _has_many_unused(self) -> bool:
        slots, windows = self.header["next_slot"], self.header.get("windows")
        if not windows:  # None at all, or an earlier version has not counted them.
            return False
        return slots - windows >= max(GROWTH, _MAX_UNUSED * slots)

    def _delete_obsolete_files(self) -> None:
        if self.header and self.header["obsolete_files"]:
            with self._writing():
                for file in self.header["obsolete_files"]:
                    (self.directory / file).unlink(missing_ok=True)
            with self._transaction(obsolete_files=[]):
                forget_removed(self._database, self.header["generation"])

    @contextlib.contextmanager
    def _transaction(self, **changes: Any) -> Iterator[None]:
        """One transaction of the database, with changes of the header."""
        header = {**_NEW_HEADER, **self.header, **changes}
        with self._writing(), transaction(self._database):
            upgrade(self._database, COLUMNS, ADDED_COLUMNS)
            if self.header and not {"rows", "windows"} <= header.keys():
                # An earlier version made it. Once: later transactions add what they change.
                header["rows"] = count_rows(self._database)
                header["windows"] = count_windows(self._database)
            self._added_rows = self._added_windows = 0
            yield
            header["rows"] = header.get("rows", 0) + self._added_rows
            header["windows"] = header.get("windows", 0) + self._added_windows
            stored = {"format": SHARD_FORMAT if "shard" in header else FORMAT, **header}
            stored["crc32"] = header_crc32(stored)
            self._database.execute("DELETE FROM header")
            self._database.execute("INSERT INTO header VALUES (?)", (json.dumps(stored),))
        self.header = header

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Reports a full or failing disk in one line; what was stored before is unchanged."""
        try:
            yield
        except (OSError, sqlite3.DatabaseError) as error:
            raise SearchIndexError(
                f"cannot write to the index {self.directory}"
                f" ({getattr(error, 'strerror', None) or error}); fix this, then rerun the command"
                " to continue"
            ) from error
