"""The files of a folder of videos, beside what an index knows of them."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

from drl_jax.data.video import VIDEO_SUFFIXES
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import names_below
from drl_jax.search.rows import IndexedVideo, KnownFile

# Shards of a folder, at most.
_MAX_SHARDS = 100_000
# Seconds of decoding that a file may take for each MB, beside those of `timeout`.
_SECONDS_PER_MB = 1.0


def find_videos(folder: Path, timeout: float) -> Iterator[IndexedVideo]:
    """Yields the video files below a folder.

    Args:
      folder: searched recursively.
      timeout: seconds that decoding a file may take, and one more for each MB.

    Yields:
      For each file its path, size, modification time, and in `allowed` the seconds.
    """
    for name in names_below(folder):
        if is_video(name):
            yield _found(folder, name, timeout)


def find_video(folder: Path, path: str, timeout: float) -> IndexedVideo | None:
    """The video file with a path below a folder, as `find_videos` has it; None: there is none.

    Raises:
      UserError: the path is not one of a video below the folder, or leads through a link to another
        folder below it.
    """
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        raise UserError(f"--only takes paths below {folder}, not {path}")
    if not is_text(path):
        raise UserError(f"--only={ascii(path)[1:-1]}: its name is not UTF-8; rename it")
    file = folder / path
    if file.is_dir():
        raise UserError(f"--only takes files, and {file} is a folder")
    # A folder is listed by its own path only.
    root, parent = folder.resolve(), file.parent.resolve()
    if parent.is_relative_to(root) and parent.relative_to(root) != PurePath(path).parent:
        raise UserError(f"{file} leads through a link: name {parent.relative_to(root) / file.name}")
    return _found(folder, path, timeout) if is_video(path) and file.is_file() else None


def is_video(path: str) -> bool:
    """Whether a path has the suffix of a video."""
    stem, _, suffix = path.rpartition("/")[2].rpartition(".")
    return bool(stem) and f".{suffix.lower()}" in VIDEO_SUFFIXES


def _found(folder: Path, path: str, timeout: float) -> IndexedVideo:
    status = (folder / path).stat()
    allowed = allowed_seconds(timeout, status.st_size)
    return IndexedVideo(path, status.st_size, status.st_mtime_ns, sha256="", allowed=allowed)


def allowed_seconds(timeout: float, size: int) -> float:
    """Seconds that decoding a file of `size` bytes may take."""
    return timeout + _SECONDS_PER_MB * size / 1e6


def names_of_no_files(folder: Path) -> list[str]:
    """Names of videos below a folder that are no files: links to nothing, pipes, devices."""
    found = []
    for parent, _, names in os.walk(folder):
        below = [Path(parent, name) for name in names if is_video(name)]
        found += [str(path.relative_to(folder)) for path in below if not path.is_file()]
    return sorted(found)


def is_text(path: str) -> bool:
    """Whether a path is valid UTF-8: other bytes are decoded to lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in path)


def is_outdated(known: KnownFile, found: IndexedVideo) -> bool:
    """Whether a file has changed, or may be decoded in the time that is allowed now."""
    if (known.size, known.mtime_ns) != (found.size, found.mtime_ns):
        return True
    return bool(known.allowed) and found.allowed > known.allowed


class Shard(NamedTuple):
    """A part of the files of a folder, chosen by a hash of their paths.

    Attributes:
      number: from 0.
      count: number of shards.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Reads NUMBER/COUNT, e.g. 3/16.

        Raises:
          UserError: it is something else.
        """
        number, _, count = text.partition("/")
        if number.isdecimal() and count.isdecimal() and int(number) < int(count) <= _MAX_SHARDS:
            return cls(int(number), int(count))
        raise UserError(f"--shard={text}: write NUMBER/COUNT, from 0/16 to 15/16 for 16 shards")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has(self, path: str) -> bool:
        """Whether a file is in this shard; the same on every machine."""
        digest = hashlib.sha256(os.fsencode(path)).digest()
        return int.from_bytes(digest[:8]) % self.count == self.number
