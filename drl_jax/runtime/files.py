"""Files: atomic writes, hashes, and the video files below a folder."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that replaces it when the block ends without an error.

    Readers see the old file or the whole new one. Missing parent directories are created.

    Raises:
      OSError: the file cannot be written; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two writers of one file apart.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content.

    Raises:
      OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_with_suffix(directory: Path, suffixes: Iterable[str]) -> list[Path]:
    """The regular files below a directory with one of these lower-case suffixes, sorted."""
    suffixes = frozenset(suffixes)
    return [
        path
        for path in sorted(directory.rglob("*"))
        if path.suffix.lower() in suffixes and path.is_file()
    ]
