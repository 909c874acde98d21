"""Tensors of a file, which are read when they are copied: no more than a piece is in memory."""

import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.weights.errors import WeightsError, about, refused

# Bytes that are read at a time. They are transposed in the processor's cache.
_PIECE = 2**20


class Sealed:
    """What a pickle may name, and not change."""

    def __setstate__(self, state: Any) -> None:
        raise refused("a state for a tensor or a function")


class Storage(Sealed):
    """Elements of one type that follow each other in a file.

    `size` is their number, `start` the first byte (a pickle names storages before that is known),
    and `crc32` the checksum that the file states, or None.
    """

    def __init__(self, path: Path, dtype: np.dtype, size: int, start: int = -1):
        self.path, self.dtype, self.size, self.start = path, dtype, size, start
        self.crc32: int | None = None

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def checksum(self, start: int = 0) -> int:
        """CRC-32 of the bytes, continued from `start`."""
        with about(self.path), self.path.open("rb") as file:
            file.seek(self.start)
            for done in range(0, self.nbytes, _PIECE):
                start = zlib.crc32(file.read(min(_PIECE, self.nbytes - done)), start)
        return start

    def verify(self) -> None:
        """Raises WeightsError if the file states another checksum."""
        with about(self.path):
            if self.crc32 is not None and self.checksum() != self.crc32:
                raise WeightsError("is damaged: a checksum is wrong; get it again")


class Tensor(Sealed):
    """An array whose values are in a file; `np.asarray` reads it.

    It is a view of a storage, with an offset and strides in elements, or several such `parts`, one
    after another along the first axis. Views of it are not read before they are copied, either.
    """

    def __init__(
        self,
        storage: Storage,
        shape: Iterable[int],
        offset: int = 0,
        strides: Iterable[int] | None = None,
        parts: "tuple[Tensor, ...]" = (),
    ):
        self.storage, self.shape, self.offset = storage, tuple(shape), offset
        usual = (math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        self.strides = tuple(usual if strides is None else strides)
        self.parts = parts or (self,)
        self.dtype, self.ndim, self.size = storage.dtype, len(self.shape), math.prod(self.shape)

    @classmethod
    def joined(cls, named: "Iterable[tuple[str, Tensor]]") -> "Tensor":
        """One after another, of equal types, and of equal shapes but for the first axis."""
        names, parts = zip(*named, strict=True)
        first = parts[0]
        for name, part in zip(names, parts, strict=True):
            is_equal = first.ndim > 0 and part.shape[1:] == first.shape[1:]
            if not (is_equal and part.ndim == first.ndim and part.dtype == first.dtype):
                problem = f"{part.dtype} {list(part.shape)} beside {list(first.shape)}"
                raise WeightsError(f"has {name} of another shape or type: {problem}")
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
        return cls(first.storage, shape, parts=parts) if len(parts) > 1 else first

    def _view(self, shape: Iterable[int], strides: Iterable[int], offset: int = 0) -> "Tensor":
        (_,) = self.parts
        return Tensor(self.storage, shape, self.offset + offset, strides)

    @property
    def T(self) -> "Tensor":
        """With the axes in reverse order."""
        return self._view(self.shape[::-1], self.strides[::-1])

    def squeezed(self, ndim: int) -> "Tensor":
        """Without leading axes of size 1, until there are `ndim`."""
        start = 0
        while self.ndim - start > ndim and self.shape[start] == 1:
            start += 1
        return self._view(self.shape[start:], self.strides[start:])

    def rows(self, start: int, stop: int) -> "Tensor":
        """A range of the first axis."""
        return self._view((stop - start, *self.shape[1:]), self.strides, start * self.strides[0])

    def copy_to(self, out: np.ndarray) -> None:
        """Writes the values into an array of the same shape, converted to its type.

        Raises:
          WeightsError: the file has become shorter.
          Unavailable: it cannot be read.
        """
        row = 0
        for part in self.parts if self.size else ():
            part._copy_to(out[row : row + part.shape[0]] if self.ndim else out[None])
            row += part.shape[0] if self.ndim else 1

    def _copy_to(self, out: np.ndarray) -> None:
        """Of one part; a piece is some rows of the outermost axis in the file."""
        shape, strides = self.shape or (1,), self.strides or (1,)
        order = sorted(range(len(shape)), key=lambda axis: -strides[axis] * (shape[axis] > 1))
        rows, steps = out.transpose(order), [strides[axis] for axis in order]
        size = self.dtype.itemsize
        count = max(1, _PIECE // max(1, steps[0] * size))
        with about(self.storage.path), self.storage.path.open("rb") as file:
            for start in range(0, len(rows), count):
                piece = rows[start : start + count]
                last = sum((n - 1) * step for n, step in zip(piece.shape, steps, strict=True))
                file.seek(self.storage.start + (self.offset + start * steps[0]) * size)
                data = file.read((last + 1) * size)
                if len(data) != (last + 1) * size:
                    raise WeightsError("is damaged: it ends inside a tensor")
                flat, by_bytes = np.frombuffer(data, self.dtype), [step * size for step in steps]
                piece[...] = np.lib.stride_tricks.as_strided(flat, piece.shape, by_bytes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        self.copy_to(out)
        return out if dtype is None else out.astype(dtype, copy=False)


# Tensors by name; those of models in memory are arrays.
StateDict = dict[str, Any]
