"""Tar files whose members are read in place, without unpacking. Workers import this module."""

import dataclasses
import errno
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from drl_jax.data.video_file import VideoError
from drl_jax.runtime.errors import UserError, one_line

# First bytes of compressed files, and the program that unpacks them.
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\x00": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
# Largest member that is read as a whole, bytes.
MAX_CONTENT = 1 << 26
# What follows the end of a tar file is read in pieces of this size, bytes.
_PIECE = 1 << 20


class TarError(UserError):
    """A tar file that cannot be read in place."""


@dataclasses.dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file inside an uncompressed tar file; `offset` is that of its first byte."""

    path: Path
    name: str
    offset: int
    size: int

    @property
    def place(self) -> tuple[str, int, int]:
        """What tells it from other members of the tar file."""
        return self.name, self.offset, self.size

    def open(self, mode: str = "rb") -> BinaryIO:
        """Opens it for reading, like a file of its own; VideoError if it is empty."""
        if not self.size:  # FFmpeg would say "Invalid argument".
            raise VideoError(f"has no bytes in {self.path.name}")
        return io.BufferedReader(_Window(self))


class _Window(io.RawIOBase):
    """The bytes of a member; the position 0 is its first byte."""

    def __init__(self, member: TarMember):
        self.name = member.name  # FFmpeg looks at the suffix.
        self._start, self._size, self._position = member.offset, member.size, 0
        self._file = member.path.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: bytearray) -> int:
        wanted = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[:wanted])
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def read_members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yields the header of every member of a tar file, in order, and the file to read it from.

    Only headers are read.

    Raises:
      TarError: the file is compressed, damaged, truncated, no tar file, or several in one.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        _check_start(path, file)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    yield member, tar
                    # It would hold the headers of all members.
                    tar.members.clear()  # type: ignore[attr-defined]
                end = tar.offset
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise _damaged(path, one_line(error)) from error
        _check_end(path, file, end)


def read_content(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Content of a member of at most `MAX_CONTENT` bytes, from the file of `read_members`."""
    tar.fileobj.seek(member.offset_data)
    content = tar.fileobj.read(member.size)
    if len(content) < member.size:
        raise _damaged(path, f"it ends inside {member.name}")
    return content


def _check_start(path: Path, file: BinaryIO) -> None:
    start = file.read(8)
    for magic, program in _COMPRESSED.items():
        if start.startswith(magic):
            raise TarError(
                f"{path} is compressed, and its members cannot be read in place; unpack it to a"
                f" plain .tar file with {program} (videos are compressed already)"
            )
    if not start:
        raise TarError(f"{path} is empty; it must be a tar file")


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """tarfile stops without an error at a damaged header, and at the end of a truncated file."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise _damaged(path, f"it ends at byte {end + len(block)} without the mark of its end")
    if block.strip(b"\0"):
        raise _damaged(path, f"no header of a member at byte {end}")
    while piece := file.read(_PIECE):
        if piece.strip(b"\0"):
            raise TarError(
                f"{path} has data after its end at byte {end}: it is damaged, or several tar files"
                " are in one; copy or download it again, or keep them as separate files"
            )


def _damaged(path: Path, reason: str) -> TarError:
    return TarError(
        f"{path} is damaged or truncated ({reason}); copy or download it again, or remove it"
    )
