"""Files of a directory, and files that the operating system refuses to open."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path


def contents(directory: Path) -> dict[Path, bytes]:
    """Content of each file below a directory, by its path relative to it."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory): path.read_bytes() for path in files}


@contextlib.contextmanager
def refused(path: Path) -> Iterator[None]:
    """Makes every library fail to open a file or directory, also for root, for whom modes do not
    count: a link to itself (ELOOP)."""
    aside = path.with_name(f"aside.{path.name}")
    path.rename(aside)
    path.symlink_to(path.name)
    try:
        yield
    finally:
        path.unlink()
        aside.rename(path)


@contextlib.contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    """Sets a soft limit of this process, e.g. RLIMIT_FSIZE: 0 is a disk that is full (EFBIG)."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)
