"""Files of a directory, and files and disks that the operating system refuses to open or fill."""

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


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
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """Makes a directory with a file system of its own, of a size such as "3m"."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def enlarge(disk: Path, size: str) -> None:
    """Gives such a file system another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def flip_largest(directory: Path) -> Path:
    """Flips a bit of the largest file below a directory; its path."""
    path = max(directory.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


@contextlib.contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    """Sets a soft limit of this process, e.g. RLIMIT_FSIZE: 0 is a disk that is full (EFBIG)."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)
