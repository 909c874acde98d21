"""How far indexing is, for the processes that search: a file in the directory of the index.

It is no part of the index: a new state would make open sessions open the index anew.
"""

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from drl_jax.runtime.files import write_json
from drl_jax.runtime.lock import is_locked
from drl_jax.search.index_file import LOCK

_FILE = "indexing.json"
# Seconds between two writes.
_INTERVAL = 1.0


class Progress(NamedTuple):
    """Progress of an update.

    Attributes:
      done: files that were read.
      total: new and changed files.
    """

    done: int
    total: int


class ProgressFile:
    """Writes the progress of an update; a context manager that deletes the file at its end.

    A file that cannot be written is left out: the update itself reports a full disk.
    """

    def __init__(self, directory: Path, total: int):
        """Writes nothing.

        Args:
          directory: of the index, which this process has locked.
          total: new and changed files.
        """
        self._path, self._total = directory / _FILE, total
        self._next_write = 0.0

    def __enter__(self) -> "ProgressFile":
        self.update(0)
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def update(self, done: int) -> None:
        """Writes the number of files that were read, at most once a second."""
        if not self._total or time.monotonic() < self._next_write:
            return
        self._next_write = time.monotonic() + _INTERVAL
        with contextlib.suppress(OSError):
            write_json(self._path, {"done": done, "total": self._total})


def progress_of(directories: Iterable[Path]) -> Progress | None:
    """The progress of the processes that update the parts of an index; None if there is none."""
    found = [progress for directory in directories if (progress := read_progress(directory))]
    return Progress(*map(sum, zip(*found, strict=True))) if found else None


def read_progress(directory: Path) -> Progress | None:
    """The progress of the process that updates an index; None if there is none.

    The file of a process that was killed is no progress: the lock of the index is free.

    Args:
      directory: of the index.
    """
    try:
        values = json.loads((directory / _FILE).read_text(encoding="utf-8"))
        progress = Progress(int(values["done"]), int(values["total"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return progress if is_locked(directory / LOCK) else None
