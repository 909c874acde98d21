"""Files of a directory."""

from pathlib import Path


def contents(directory: Path) -> dict[Path, bytes]:
    """Content of each file below a directory, by its path relative to it."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory): path.read_bytes() for path in files}
