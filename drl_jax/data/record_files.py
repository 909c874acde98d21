"""Random access to the records of many array_record files, with a bounded number of open files."""

import bisect
import collections
import itertools
import resource
import threading
from collections.abc import Sequence
from pathlib import Path

from array_record.python import array_record_module

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
        self._open: collections.OrderedDict[int, array_record_module.ArrayRecordReader] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = _MAX_OPEN
        if soft_limit != resource.RLIM_INFINITY:
            allowed = min(allowed, int(soft_limit * _SHARE_OF_LIMIT))
        self._max_open = max(1, allowed)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, record: int) -> bytes:
        """Reads a record; OSError, RuntimeError or ValueError if it cannot (`refusal`)."""
        if not 0 <= record < len(self):
            raise IndexError(f"there is no record {record}")
        number = self._number(record)
        first = self._ends[number - 1] if number else 0
        return self._reader(number).read([record - first])[0]

    def file(self, record: int) -> Path:
        """The file of a record."""
        return self._files[self._number(record)]

    def _number(self, record: int) -> int:
        return bisect.bisect_right(self._ends, record)

    def _reader(self, number: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        # Without the lock, so that other threads read meanwhile. If two threads open a file at
        # once, the second reader is used only for its own record. Reading ahead would be wasted.
        reader = array_record_module.ArrayRecordReader(
            str(self._files[number]),
            options="readahead_buffer_size:0",
            file_reader_buffer_size=32768,
        )
        with self._lock:
            self._open.setdefault(number, reader)
            while len(self._open) > self._max_open:
                # Not closed: another thread may read from it. Its file is closed with its last use.
                self._open.popitem(last=False)
        return reader
