"""Array files of an index: row n of every file belongs to slot n.

An index describes its arrays by name: {"dtype", "shape" (of a row), "file"}.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from drl_jax.models.interactions import Features

Described = dict[str, dict[str, Any]]

# Files grow by this many rows, and are copied in blocks of as many.
GROWTH = 256


def map_arrays(
    directory: Path,
    described: Mapping[str, Mapping[str, Any]],
    slots: int = 0,
    *,
    strict: bool = True,
) -> Features:
    """Memory-maps arrays: [at least `slots`, ...] each.

    Args:
      directory: of the index.
      described: the arrays.
      slots: rows that there must be.
      strict: if False, an array has the rows that its file has in full, which may be none.

    Raises:
      ValueError: a file is missing or too short, or the description is wrong.
    """
    arrays = {}
    for name, array in described.items():
        path, shape = directory / array["file"], tuple(array["shape"])
        try:
            if strict:
                values = np.memmap(path, array["dtype"], "r")
                arrays[name] = values.reshape(-1, *shape)
            else:
                arrays[name] = _whole_rows(path, np.dtype(array["dtype"]), shape)
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"the array {name} cannot be read: {reason}") from error
        if len(arrays[name]) < slots:
            raise ValueError(f"the array {name} has {len(arrays[name])} rows, not {slots}")
    return arrays


def _whole_rows(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The rows that a file has in full."""
    row_bytes = dtype.itemsize * int(np.prod(shape))
    count = path.stat().st_size // row_bytes if path.exists() else 0
    if not count:
        return np.zeros((0, *shape), dtype)
    return np.memmap(path, dtype, "r", shape=(count, *shape))


def write_rows(
    directory: Path, described: Described, generation: int, arrays: Features, first: int
) -> Described:
    """Writes rows to slots `first`, `first + 1`, ..., and flushes them to disk.

    Args:
      directory: of the index.
      described: the arrays that exist.
      generation: used in the names of new files.
      arrays: the rows, [B, ...] each.
      first: the slot of the first row.

    Returns:
      The arrays that exist now.
    """
    described = dict(described)
    for name, rows in arrays.items():
        if name not in described:
            described[name] = {
                "dtype": rows.dtype.name,
                "shape": list(rows.shape[1:]),
                "file": _file_name(name, generation),
            }
        path = directory / described[name]["file"]
        row_bytes = rows[0].nbytes
        with path.open("r+b" if path.exists() else "w+b") as file:
            end = -(-(first + len(rows)) // GROWTH) * GROWTH * row_bytes
            if file.seek(0, os.SEEK_END) < end:
                file.truncate(end)  # Sparse: takes no space until it is written.
            file.seek(first * row_bytes)
            file.write(np.ascontiguousarray(rows).tobytes())
            _flush(file)
    return described


def copy_rows(
    directory: Path, described: Described, generation: int, slots: Sequence[int]
) -> Described:
    """Copies the rows of some slots to slots 0, 1, ... of files of another generation.

    Returns:
      The description of the copies.
    """
    copies = {}
    for name, array in map_arrays(directory, described).items():
        file_name = _file_name(name, generation)
        with (directory / file_name).open("wb") as file:
            for start in range(0, len(slots), GROWTH):
                file.write(array[slots[start : start + GROWTH]].tobytes())
            _flush(file)
        copies[name] = {**described[name], "file": file_name}
    return copies


def _file_name(name: str, generation: int) -> str:
    return f"{name}.{generation}.bin" if generation else f"{name}.bin"


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
