"""Tensors of a file, which are read when they are copied: no more than a piece is in memory."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drl_jax.weights.errors import WeightsFileError, about

# Bytes that are read at a time. They are transposed in the processor's cache.
PIECE = 2**20


class _Span(NamedTuple):
    """A view of bytes in a file: its first byte, and strides in elements."""

    path: Path
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def copy_to(self, out: np.ndarray) -> None:
        if not out.size:
            return
        # The order of axes in which the elements are in the file, if they follow each other.
        order = sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis])
        step, is_dense = 1, True
        for axis in reversed(order):
            is_dense &= self.strides[axis] == step or self.shape[axis] == 1
            step *= self.shape[axis]
        with about(self.path), self.path.open("rb") as file:
            file.seek(self.offset)
            if not out.ndim or not is_dense:
                last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
                flat, size = self._read(file, last + 1), self.dtype.itemsize
                strides = [stride * size for stride in self.strides]
                out[...] = np.lib.stride_tricks.as_strided(flat, self.shape, strides)
                return
            rows = out.transpose(order)
            elements = math.prod(rows.shape[1:])
            step = max(1, PIECE // max(1, elements * self.dtype.itemsize))
            for start in range(0, len(rows), step):
                piece = rows[start : start + step]
                piece[...] = self._read(file, len(piece) * elements).reshape(piece.shape)

    def _read(self, file: Any, elements: int) -> np.ndarray:
        data = file.read(elements * self.dtype.itemsize)
        if len(data) != elements * self.dtype.itemsize:
            raise WeightsFileError("is damaged: it ends inside a tensor")
        return np.frombuffer(data, self.dtype)


class Tensor:
    """An array whose values are in a file, in one place or in several along the first axis.

    `np.asarray` reads it. Its parts are tensors, too, and are not read before they are copied.
    """

    def __init__(self, spans: Iterable[_Span]):
        self.spans = tuple(spans)
        first = self.spans[0]
        self.dtype, self.shape = first.dtype, first.shape
        if len(self.spans) > 1:
            self.shape = (sum(span.shape[0] for span in self.spans), *first.shape[1:])

    @classmethod
    def at(
        cls, path: Path, dtype: np.dtype, offset: int, shape: tuple, strides: tuple | None = None
    ) -> "Tensor":
        """Values from byte `offset` of a file on; strides are in elements (None: contiguous)."""
        if strides is None:
            strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls([_Span(path, dtype, offset, tuple(shape), tuple(strides))])

    @classmethod
    def joined(cls, parts: "Iterable[Tensor]") -> "Tensor":
        """Tensors of equal shapes but for the first axis, one after another."""
        return cls(span for part in parts for span in part.spans)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def T(self) -> "Tensor":
        """A matrix with its axes swapped."""
        (span,) = self.spans
        return Tensor([span._replace(shape=span.shape[::-1], strides=span.strides[::-1])])

    def squeezed(self, ndim: int) -> "Tensor":
        """Without leading axes of size 1, until there are `ndim`."""
        (span,) = self.spans
        start = 0
        while len(span.shape) - start > ndim and span.shape[start] == 1:
            start += 1
        return Tensor([span._replace(shape=span.shape[start:], strides=span.strides[start:])])

    def rows(self, start: int, stop: int) -> "Tensor":
        """A range of the first axis."""
        (span,) = self.spans
        offset = span.offset + start * span.strides[0] * self.dtype.itemsize
        return Tensor([span._replace(offset=offset, shape=(stop - start, *span.shape[1:]))])

    def copy_to(self, out: np.ndarray) -> None:
        """Writes the values into an array of the same shape, converted to its type.

        Raises:
          WeightsFileError: the file has become shorter.
          Unavailable: it cannot be read.
        """
        if len(self.spans) == 1:
            self.spans[0].copy_to(out)
            return
        row = 0
        for span in self.spans:
            span.copy_to(out[row : row + span.shape[0]])
            row += span.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        self.copy_to(out)
        return out if dtype is None else out.astype(dtype, copy=False)


# Tensors by name; those of models in memory are arrays.
StateDict = dict[str, Any]
