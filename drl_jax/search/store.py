"""Files of a search index, and reading them.

- `index.sqlite`: the header (JSON) and one row per video file, with checksums.
- `NAME.bin`, `NAME.GENERATION.bin`: one array of features each. Row n of every array belongs to the
  window whose slot is n; the windows of a video have consecutive slots.
- `lock`: locked by the process that writes; a crash releases the lock.

Writes (`writer.py`). Features are written to slots that were never used, then one SQLite
transaction assigns the slots to videos. A writer that is killed leaves the index in the state after
its last transaction.

Slots are not reused. Removing or changing a video leaves its old slot unused, so the rows that a
reader has memory-mapped stay those of the videos it lists, and readers need no lock. `compact`
reclaims the space: it copies the used rows to files of a new generation, and one transaction
switches to them. The old files are deleted when the index is next opened for writing, long after
the queries that were running at the switch.

Reads. A Store sees one state of the index: it reads in one transaction, and the files it maps keep
their rows. `index_version` changes with every transaction; `SearchSession` checks it before each
query. Opening an index reads the slots of its videos, from an index of the table, and a video is
read when it is shown (`videos.py`). For open readers, rows of removed videos, and slots that
`compact` changes, stay in `removed_videos` as long as the old files.

Format 5, in which a video has windows; 6 is an index of one shard of a folder, to which earlier
versions would add all files. Format 4 has one window a video, format 3 also lacks checksums
(`rows.py`), and format 2 is converted in memory when it is read (`format_2.py`). They are converted
in the database, in one transaction that renames no files, when their own model first updates them;
their videos keep their one window until their files change.
"""

import contextlib
import itertools
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.search.array_files import map_arrays
from drl_jax.search.database import (
    count_rows,
    count_with_slot,
    count_without_slot,
    select_at_slots,
    select_listing,
    select_paths,
    select_removed,
    select_slots,
    select_slots_of_paths,
    select_strip,
    select_videos,
    select_without_slot,
)
from drl_jax.search.database_file import database_path, open_database
from drl_jax.search.header import read_header
from drl_jax.search.listing import Listing
from drl_jax.search.rows import COLUMNS, IndexedVideo, SearchIndexError, damaged, from_row

# Videos that one statement selects by their slots; SQLite takes 32,766 values at most.
_SELECTED = 500


class Store:
    """One state of an index on disk, for reading; a context manager.

    Attributes:
      directory: of the index.
      header: what the index was made with.
    """

    def __init__(self, directory: Path):
        """Opens an index.

        Args:
          directory: of the index.

        Raises:
          SearchIndexError: there is no index, or it is damaged.
        """
        if not database_path(directory).is_file():
            raise SearchIndexError(
                f"no index in {directory}; make one with: python -m drl_jax.search index"
                f" --workdir=RUN --videos=DIR --index={directory}"
            )
        self._open(directory, write=False)
        if not self.header:
            self._database.close()
            raise SearchIndexError(
                f"the index {directory} is empty: indexing was interrupted before the first video;"
                " rerun it"
            )

    def _open(self, directory: Path, *, write: bool) -> None:
        self.directory = directory
        with self._reading():
            self._database = open_database(directory, write=write)
            self.header: dict[str, Any] = read_header(directory, self._database)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._database.close()

    # ------------------------------------------------------------------ videos

    def videos(self) -> list[IndexedVideo]:
        """All files, ordered by path.

        Raises:
          SearchIndexError: the list is damaged.
        """
        with self._reading():
            videos = [from_row(row) for row in select_videos(self._database, COLUMNS)]
            for video in videos:
                self._check_stop(video.path, video.slots.stop)
            self._check_count(len(videos))
        return sorted(videos, key=lambda video: video.path)

    def count(self) -> int:
        """Number of files, including those that cannot be searched."""
        rows = self.header.get("rows")  # Format 3 and older do not have it.
        return count_rows(self._database) if rows is None else rows

    def _check_stop(self, path: str, stop: int) -> None:
        """Checks that the slots of a video are before those that were never used."""
        if stop > self._rows:
            raise ValueError(f"the slots of {path} end at {stop}, behind {self._rows}")

    def _check_count(self, listed: int) -> None:
        """Checks how many files the table lists."""
        if (rows := self.header.get("rows", listed)) != listed:
            raise ValueError(f"it lists {listed} of {rows} videos")

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
            values = itertools.chain.from_iterable(select_slots(self._database))
            rows = np.fromiter(values, np.int64).reshape(-1, 2)
            first, counts = rows[rows[:, 0].argsort(kind="stable")].T.copy()
            ends = first + counts
            is_whole = (counts > 0).all() and (ends[:-1] <= first[1:]).all()
            if len(rows) and not (is_whole and first[0] >= 0 and ends[-1] <= self._rows):
                raise ValueError("the slots of its videos are not those of its arrays")
            self._check_count(len(rows) + count_without_slot(self._database))
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

    def paths(self) -> Iterator[str]:
        """Paths of all files.

        Raises:
          SearchIndexError: the database is damaged.
        """
        with self._reading():
            yield from (path for (path,) in select_paths(self._database))

    def check_table(self) -> None:
        """Checks that every file is listed: with a slot, or as one that cannot be searched.

        Raises:
          SearchIndexError: a row is damaged.
        """
        with self._reading():
            listed = count_with_slot(self._database) + len(self.unsearchable())
            # In the table itself: other counts rely on its indexes.
            if (rows := count_rows(self._database)) != listed:
                raise ValueError(f"it has {rows} files and lists {listed}")

    def slots_of_paths(
        self, paths: Sequence[str], generation: int
    ) -> dict[str, list[tuple[int, str]]]:
        """First slots and hashes of the videos with some paths in the states of a generation.

        Raises:
          SearchIndexError: the database is damaged.
        """
        found: dict[str, list[tuple[int, str]]] = {path: [] for path in paths}
        some = list(found)
        with self._reading():
            current = self.header["generation"]
            for start in range(0, len(some), _SELECTED):
                part = some[start : start + _SELECTED]
                rows = select_slots_of_paths(self._database, part, generation, current)
                for path, slot, sha256 in rows:
                    found[path].append((slot, sha256))
        return found

    def listing(self, generation: int) -> Listing:
        """What filters need of the videos that can be searched, in no order.

        Raises:
          SearchIndexError: the slots are not of this generation any more, or the list is damaged.
        """
        with self._reading():
            if generation != self.header["generation"]:
                raise self._outdated()
            return Listing.of_rows(select_listing(self._database))

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

    # ------------------------------------------------------------------ arrays

    def arrays(self) -> Features:
        """The stored arrays (`quantization.quantize`), memory-mapped; row n is slot n.

        Raises:
          SearchIndexError: a file is damaged.
        """
        with self._reading(can_heal=True):
            return map_arrays(self.directory, self.header["arrays"], self.header["next_slot"])

    def nbytes(self) -> int:
        """Size of all arrays on disk, bytes."""
        files = [self.directory / array["file"] for array in self.header["arrays"].values()]
        return sum(file.stat().st_size for file in files)

    # ------------------------------------------------------------------ database

    @contextlib.contextmanager
    def _reading(self, *, can_heal: bool = False) -> Iterator[None]:
        """Reports damage in one line, also that which raises an unforeseen error; see `damaged`."""
        try:
            yield
        except (sqlite3.Error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(self.directory, error, can_heal=can_heal) from error
