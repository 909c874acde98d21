"""Files of a search index.

- `index.sqlite`: the header (JSON) and one row per video file, with checksums.
- `NAME.bin`, `NAME.GENERATION.bin`: one array of features each. Row n of every array belongs to the
  window whose slot is n; the windows of a video have consecutive slots.
- `lock`: locked by the process that writes; a crash releases the lock.

Writes. Features are written to slots that were never used, then one SQLite transaction assigns the
slots to videos. A writer that is killed leaves the index in the state after its last transaction.

Slots are not reused. Removing or changing a video leaves its old slot unused, so the rows that a
reader has memory-mapped stay those of the videos it lists, and readers need no lock. `compact`
reclaims the space: it copies the used rows to files of a new generation, and one transaction
switches to them. The old files are deleted when the index is next opened for writing, long after
the queries that were running at the switch.

Reads. A Store opened for reading sees one state of the index: it reads in one transaction, and
the files it maps keep their rows. `index_version` changes with every transaction; `SearchSession`
checks it before each query.

Format 5, in which a video has windows. Format 4 has one window a video, format 3 also lacks
checksums (`rows.py`), and format 2 is converted in memory when it is read (`format_2.py`). Older
formats are converted in the database, in one transaction that renames no files, when their own
model first updates them; their videos keep their one window until their files change.
"""

import contextlib
import json
import shutil
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.runtime.lock import locked
from drl_jax.search.array_files import GROWTH, copy_rows, map_arrays, write_rows
from drl_jax.search.database import (
    add_strips,
    count_rows,
    database_path,
    forget_removed,
    keep_slots_of,
    lock_path,
    open_database,
    remove_videos,
    replace_videos,
    select_at_slots,
    select_listing,
    select_removed,
    select_slots,
    select_slots_of_path,
    select_strip,
    select_video,
    select_videos,
    select_without_slot,
    transaction,
    upgrade,
)
from drl_jax.search.format_2 import header_from_format_2
from drl_jax.search.quantization import quantize
from drl_jax.search.rows import (
    ADDED_COLUMNS,
    COLUMNS,
    IndexedVideo,
    ListedVideo,
    SearchIndexError,
    check_header,
    damaged,
    damaged_features,
    features_crc32,
    from_row,
    header_crc32,
    row_crc32,
    to_row,
)

_FORMAT = 5
# `compact` copies the arrays if more than this share of the slots, and `GROWTH` slots, are unused.
_MAX_UNUSED = 0.25
# Videos that one statement selects by their slots; SQLite takes 32,766 values at most.
_SELECTED = 500
# Header of an index without videos; `update_header` adds the rest.
_NEW_HEADER = {
    "arrays": {},
    "generation": 0,
    "next_slot": 0,
    "obsolete_files": [],
}


class Store:
    """An index on disk; a context manager.

    Attributes:
      directory: of the index.
      header: what the index was made with; empty for a new index.
    """

    def __init__(self, directory: Path, *, write: bool = False):
        """Opens an index.

        Args:
          directory: of the index.
          write: also creates the directory, and excludes other writers.

        Raises:
          SearchIndexError: there is no index to read, or it is damaged.
          LockError: another process writes to it.
        """
        self.directory = directory
        self._spool = directory / "spool"
        self._lock = contextlib.ExitStack()
        if write:
            try:
                self._lock.enter_context(locked(lock_path(directory), f"the index {directory}"))
            except OSError as error:
                raise SearchIndexError(
                    f"cannot write to --index={directory}: {error.strerror}"
                ) from error
        database = database_path(directory)
        if not write and not database.is_file():
            raise SearchIndexError(
                f"no index in {directory}; make one with: python -m drl_jax.search index"
                f" --workdir=RUN --videos=DIR --index={directory}"
            )
        with self._reading():
            self._database = open_database(directory, write=write)
            self.header: dict[str, Any] = self._read_header()
        if not write and not self.header:
            raise SearchIndexError(
                f"the index {directory} is empty: indexing was interrupted before the first video;"
                " rerun it"
            )
        if write:
            self._delete_obsolete_files()
            shutil.rmtree(self._spool, ignore_errors=True)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self._database.close()
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

    # ------------------------------------------------------------------ videos

    def videos(self) -> list[IndexedVideo]:
        """All files, ordered by path.

        Raises:
          SearchIndexError: the list is damaged.
        """
        with self._reading():
            rows = select_videos(self._database, COLUMNS)
            videos = [from_row(row) for row in rows]
            for video in videos:
                if video.slots.stop > self._rows:
                    raise ValueError(f"the slot of {video.path} is {video.slot}")
        return sorted(videos, key=lambda video: video.path)

    def count(self) -> int:
        """Number of files, including those that cannot be searched."""
        return self._database.execute("SELECT COUNT(*) FROM videos").fetchone()[0]

    @property
    def _rows(self) -> int:
        """Rows of the arrays that are or were used."""
        return self.header.get("next_slot", 0)

    def slots(self) -> tuple[np.ndarray, np.ndarray]:
        """First slot and number of windows of each video that can be searched, by their slots.

        Returns:
          int64 [V] both.

        Raises:
          SearchIndexError: the list is damaged.
        """
        with self._reading():
            rows = sorted(select_slots(self._database))
            first, counts = np.array(rows, np.int64).reshape(-1, 2).T.copy()
            ends = first + counts
            is_whole = (counts > 0).all() and (ends[:-1] <= first[1:]).all()
            if len(rows) and not (is_whole and first[0] >= 0 and ends[-1] <= self._rows):
                raise ValueError("the slots of its videos are not those of its arrays")
        return first, counts

    def videos_at(self, counts: Mapping[int, int], generation: int) -> dict[int, IndexedVideo]:
        """Reads videos of this state of the index, or of an earlier one.

        Args:
          counts: number of windows by first slot.
          generation: of the array files that the slots belong to.

        Returns:
          The videos by first slot.

        Raises:
          SearchIndexError: a video is damaged, or was removed long ago.
        """
        found: dict[int, IndexedVideo] = {}
        slots = list(counts)
        with self._reading():
            for start in range(0, len(slots), _SELECTED):
                some = slots[start : start + _SELECTED]
                rows = []
                if generation == self.header["generation"]:
                    rows = select_at_slots(self._database, some, COLUMNS)
                if len(rows) < len(some):
                    rows += select_removed(self._database, some, generation, COLUMNS)
                found |= {video.slot: video for video in map(from_row, rows)}
            for slot, count in counts.items():
                if slot not in found:
                    raise self._outdated()
                if len(found[slot].windows) != count:
                    raise ValueError(f"{found[slot].path} does not have {count} windows")
        return {slot: found[slot] for slot in slots}

    def unsearchable(self) -> list[IndexedVideo]:
        """The files that cannot be searched, ordered by path.

        Raises:
          SearchIndexError: a row is damaged.
        """
        with self._reading():
            videos = map(from_row, select_without_slot(self._database, COLUMNS))
            return sorted(videos, key=lambda video: video.path)

    def check_table(self) -> None:
        """Checks that every file is listed: with a slot, or as one that cannot be searched.

        Raises:
          SearchIndexError: a row is damaged.
        """
        listed = len(select_slots(self._database)) + len(self.unsearchable())
        with self._reading():
            # In the table itself: other counts rely on its indexes.
            if (rows := count_rows(self._database)) != listed:
                raise ValueError(f"it has {rows} files and lists {listed}")

    def slots_of_path(self, path: str, generation: int) -> list[int]:
        """First slots of the videos with a path in the states of a generation.

        Raises:
          SearchIndexError: the database is damaged.
        """
        with self._reading():
            current = self.header["generation"]
            return select_slots_of_path(self._database, path, generation, current)

    def listing(self, generation: int) -> Iterator[ListedVideo]:
        """What filters need of the videos that can be searched, in no order.

        Raises:
          SearchIndexError: the slots are not of this generation any more, or the list is damaged.
        """
        with self._reading():
            if generation != self.header["generation"]:
                raise self._outdated()
            for slot, path, mtime_ns, duration, times in select_listing(self._database):
                length = max(json.loads(times), default=0.0) if duration is None else duration
                yield ListedVideo(slot, path, mtime_ns, length)

    def _outdated(self) -> SearchIndexError:
        return SearchIndexError(
            f"the index {self.directory} was made anew while it was read; ask again"
        )

    def strip(self, path: str, number: int) -> bytes:
        """A JPEG file with frames of a video side by side; empty if there is none.

        Args:
          path: of the video.
          number: of the strip; n has the frames from n * STRIP_FRAMES.

        Raises:
          SearchIndexError: it is damaged.
        """
        with self._reading():
            jpeg, crc32 = select_strip(self._database, path, number) or (b"", None)
            if crc32 is not None and crc32 != zlib.crc32(jpeg):
                raise ValueError(f"the thumbnails of {path} have changed")
        return jpeg

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
            for path, jpegs in strips.items():
                add_strips(self._database, path, jpegs)

    def spool_file(self, number: int) -> Path:
        """A file for the frames of a long video until they are encoded; the folder exists."""
        with self._writing():
            self._spool.mkdir(exist_ok=True)
        return self._spool / f"{number}.frames"

    def damaged_videos(self, videos: Sequence[IndexedVideo]) -> set[str]:
        """Paths of videos whose features are damaged or lost."""
        with self._reading():
            arrays = map_arrays(self.directory, self.header["arrays"], strict=False)
        return damaged_features(arrays, [video for video in videos if not video.error])

    def rename(self, old: str, video: IndexedVideo) -> None:
        """Gives the features of a video that is gone to a file with the same content.

        Args:
          old: path of the video that is gone.
          video: the file; its path, size and modification time are used.
        """
        with self._transaction():
            *row, crc32 = select_video(self._database, old, COLUMNS)
            new = {"path": video.path, "size": video.size, "mtime_ns": video.mtime_ns}
            for name, value in new.items():
                row[COLUMNS.index(name)] = value
            self._database.execute(
                "UPDATE videos SET path = ?, size = ?, mtime_ns = ?, row_crc32 = ? WHERE path = ?",
                (*new.values(), None if crc32 is None else row_crc32(row), old),
            )
            self._database.execute("UPDATE strips SET path = ? WHERE path = ?", (video.path, old))

    def touch(self, video: IndexedVideo) -> None:
        """Stores a new modification time of a file with unchanged content."""
        with self._transaction():
            *row, crc32 = select_video(self._database, video.path, COLUMNS)
            row[COLUMNS.index("mtime_ns")] = video.mtime_ns
            self._database.execute(
                "UPDATE videos SET mtime_ns = ?, row_crc32 = ? WHERE path = ?",
                (video.mtime_ns, None if crc32 is None else row_crc32(row), video.path),
            )

    def remove(self, paths: Sequence[str]) -> None:
        """Removes videos, in one transaction."""
        if paths:
            with self._transaction():
                self._remove(paths)

    def _remove(self, paths: Sequence[str]) -> None:
        remove_videos(self._database, paths, self.header["generation"], COLUMNS)

    def compact(self) -> None:
        """Removes unused slots from the arrays if there are many; see the module's docstring."""
        videos = sorted((v for v in self.videos() if not v.error), key=lambda video: video.slot)
        used = [slot for video in videos for slot in video.slots]
        unused = self.header["next_slot"] - len(used)
        if not used or unused < GROWTH or unused < _MAX_UNUSED * self.header["next_slot"]:
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
            first = 0
            for video in videos:
                query = "UPDATE videos SET slot = ? WHERE slot = ?"
                self._database.execute(query, (first, video.slot))
                first += len(video.windows)

    # ------------------------------------------------------------------ arrays

    def arrays(self) -> Features:
        """The stored arrays (`quantization.quantize`), memory-mapped; row n is slot n.

        Raises:
          SearchIndexError: a file is damaged.
        """
        with self._reading():
            return map_arrays(self.directory, self.header["arrays"], self.header["next_slot"])

    def nbytes(self) -> int:
        """Size of all arrays on disk, bytes."""
        files = [self.directory / array["file"] for array in self.header["arrays"].values()]
        return sum(file.stat().st_size for file in files)

    def _delete_obsolete_files(self) -> None:
        if self.header and self.header["obsolete_files"]:
            with self._writing():
                for file in self.header["obsolete_files"]:
                    (self.directory / file).unlink(missing_ok=True)
            with self._transaction(obsolete_files=[]):
                forget_removed(self._database, self.header["generation"])

    # ------------------------------------------------------------------ database

    def _read_header(self) -> dict[str, Any]:
        row = self._database.execute("SELECT value FROM header").fetchone()
        if row is None and self.count():
            raise ValueError("it has videos without a header")
        if row is None:
            return {}
        header = json.loads(row[0])
        if header["format"] == 2:
            query = "SELECT COALESCE(MAX(slot) + 1, 0) FROM videos"
            return header_from_format_2(header, self._database.execute(query).fetchone()[0])
        if header["format"] not in (3, 4, _FORMAT):
            raise SearchIndexError(
                f"the index {self.directory} has format {header['format']}, this version reads"
                f" formats 2 to {_FORMAT}; delete it and index again"
            )
        check_header(header, rows=self.count())
        # A transaction adds those of the new state.
        return {name: header[name] for name in header.keys() - {"format", "rows", "crc32"}}

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Reports damage in one line, also that which raises an unforeseen error."""
        try:
            yield
        except (sqlite3.Error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(self.directory, error) from error

    @contextlib.contextmanager
    def _transaction(self, **changes: Any) -> Iterator[None]:
        """One transaction of the database, with changes of the header."""
        header = {**_NEW_HEADER, **self.header, **changes}
        with self._writing(), transaction(self._database):
            upgrade(self._database, COLUMNS, ADDED_COLUMNS)
            yield
            stored = {"format": _FORMAT, **header, "rows": self.count()}
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
