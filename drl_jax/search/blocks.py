"""Stored arrays in blocks of one shape, as the exact search compares them."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.search.slots import PART_SLOTS
from drl_jax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive slots of a part of an index.

    Attributes:
      part: number of the part.
      start: the first of its slots that no block before it has.
      first: its first slot.
      end: slots of the part that are used.
      size: slots of a block.
    """

    part: int
    start: int
    first: int
    end: int
    size: int

    @property
    def first_slot(self) -> int:
        """Its first slot, as one of the index."""
        return self.part * PART_SLOTS + self.first

    def rows_of(self, values: np.ndarray) -> np.ndarray:
        """Values of its slots, [size], 0 where a block before it has the slot, or no video has.

        Args:
          values: of the slots of the part, [at least `end`].
        """
        rows = np.zeros(self.size, values.dtype)
        found = values[self.start : min(self.end, self.first + self.size)]
        rows[self.start - self.first :][: len(found)] = found
        return rows


class Blocks:
    """The arrays of the parts of an index in blocks.

    They stay on the devices after the first query if they fit. On a CPU nothing is copied: a block
    is the memory map itself. So that this is also true of the last block of a part, it begins
    before the end of the previous one; only a part that is smaller than a block is copied.
    """

    def __init__(self, parts: Sequence[Features], ends: Sequence[int], size: int, layout: Layout):
        """Reads nothing.

        Args:
          parts: stored arrays of each part.
          ends: for each part, slots that are used.
          size: slots of a block.
          layout: mesh and shardings.
        """
        self.parts, self.ends, self.size, self.layout = parts, ends, size, layout
        self._kept: list[tuple[Block, dict[str, jax.Array]]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the slots that are used."""
        pairs = zip(self.parts, self.ends, strict=True)
        return sum(array[:end].nbytes for part, end in pairs for array in part.values())

    def read(self) -> Iterator[tuple[Block, dict[str, jax.Array]]]:
        """Yields each block and its arrays, of `size` rows each."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = [] if self._fits() else None
        for part, end in enumerate(self.ends):
            for start in range(0, end, self.size):
                # The files of an index have more rows than are used.
                rows = min(map(len, self.parts[part].values()))
                first = max(0, min(start, rows - self.size))
                block = Block(part, start, first, end, self.size)
                item = block, self.layout.put_batch(self._arrays(block))
                if kept is not None:
                    kept.append(item)
                yield item
        self._kept = kept

    def _arrays(self, block: Block) -> Features:
        rows = {
            name: array[block.first : block.first + self.size]
            for name, array in self.parts[block.part].items()
        }
        return {
            name: np.pad(array, ((0, self.size - len(array)), *[(0, 0)] * (array.ndim - 1)))
            if len(array) < self.size
            else array
            for name, array in rows.items()
        }

    def _fits(self) -> bool:
        """Whether all blocks together take less than half of the devices' free memory."""
        stats = jax.local_devices()[0].memory_stats()
        if not stats:
            return True  # A CPU: memory maps take no memory.
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        return self.nbytes / self.layout.device_count < free / 2
