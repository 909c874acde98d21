"""Random access to the records of many array_record files, with a bounded number of open files."""

import bisect
import functools
import itertools
import resource
from collections.abc import Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

# Open files at most, and the largest part of the files that the process may open.
_MAX_OPEN, _SHARE_OF_LIMIT = 256, 0.25


class RecordFiles(Sequence[bytes]):
    """The records of files, one file after the other. Threads may read at the same time.

    The least recently used file is closed when another one is opened beyond the limit.
    """

    def __init__(self, files: Sequence[Path], lengths: Sequence[int]):
        """Opens no file; `lengths` are the numbers of records. OSError if a file is missing."""
        for file in files:
            file.stat()
        self._files = files
        # For each file, the number of records in it and in those before it.
        self._ends = list(itertools.accumulate(lengths))
        allowed, (soft_limit, _) = _MAX_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft_limit != resource.RLIM_INFINITY:
            allowed = min(allowed, int(soft_limit * _SHARE_OF_LIMIT))
        # It opens files without a lock, so that other threads read meanwhile. A reader that it
        # drops may be in use: its file is closed with the last use.
        self._reader = functools.lru_cache(max(1, allowed))(_open)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, record: int) -> bytes:
        """Reads a record; OSError, RuntimeError or ValueError if it cannot (`refusal`)."""
        if not 0 <= record < len(self):
            raise IndexError(f"there is no record {record}")
        number = self._number(record)
        first = self._ends[number - 1] if number else 0
        return self._reader(self._files[number]).read([record - first])[0]

    def file(self, record: int) -> Path:
        """The file of a record."""
        return self._files[self._number(record)]

    def _number(self, record: int) -> int:
        return bisect.bisect_right(self._ends, record)


def _open(file: Path) -> ArrayRecordReader:
    # Reading ahead would be wasted.
    options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
    return ArrayRecordReader(str(file), **options)
