"""The files of a folder of videos, beside what an index knows of them."""

from collections.abc import Iterator
from pathlib import Path

from drl_jax.data.video import VIDEO_SUFFIXES
from drl_jax.runtime.files import files_with_suffix
from drl_jax.search.rows import IndexedVideo

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
    for path in files_with_suffix(folder, VIDEO_SUFFIXES):
        status = path.stat()
        yield IndexedVideo(
            str(path.relative_to(folder)),
            status.st_size,
            status.st_mtime_ns,
            sha256="",
            allowed=allowed_seconds(timeout, status.st_size),
        )


def allowed_seconds(timeout: float, size: int) -> float:
    """Seconds that decoding a file of `size` bytes may take."""
    return timeout + _SECONDS_PER_MB * size / 1e6


def names_of_no_files(folder: Path) -> list[str]:
    """Names of videos below a folder that are no files: links to nothing, pipes, devices."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in VIDEO_SUFFIXES and not (path.is_file() or path.is_dir())
    ]


def is_text(path: str) -> bool:
    """Whether a path is valid UTF-8: other bytes are decoded to lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in path)


def is_outdated(known: IndexedVideo, found: IndexedVideo) -> bool:
    """Whether a file has changed, or may be decoded in the time that is allowed now."""
    if (known.size, known.mtime_ns) != (found.size, found.mtime_ns):
        return True
    return bool(known.allowed) and found.allowed > known.allowed
