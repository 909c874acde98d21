"""Slots: rows of the arrays of an index.

A joined index has several parts, each of which is an index of its own. A slot of a joined index is
the number of the part times `PART_SLOTS`, plus the slot in the part. It does not change when
another part grows, and those of the only part of an index are the slots of its arrays.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from drl_jax.models.interactions import Features

# Slots of a part; more than any index has.
_BITS = 40
PART_SLOTS = 1 << _BITS


def slots_of_windows(first_slots: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [W]: the slots of the windows of V videos, in their order.

    Args:
      first_slots: int64 [V], the slot of the first window of each video.
      counts: int64 [V], windows of each video.
    """
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(first_slots - before, counts)


def by_part(slots: Sequence[int] | np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Splits slots by their parts.

    Yields:
      For each part of some of the slots: its number, where the slots of the part are among all,
      int64 [N], and these slots in the part, int64 [N].
    """
    slots = np.asarray(slots, np.int64)
    parts = slots >> _BITS
    present = np.unique(parts[np.flatnonzero(np.diff(parts, prepend=-1))]).tolist()
    for part in present:
        places = np.flatnonzero(parts == part)
        yield part, places, slots[places] - part * PART_SLOTS


def take_rows(parts: Sequence[Features], slots: Sequence[int] | np.ndarray) -> Features:
    """Copies rows of the arrays of an index: [N, ...] each.

    Args:
      parts: the arrays of each part.
      slots: int64 [N].
    """
    if not len(slots):
        return {name: array[:0] for part in parts for name, array in part.items()}
    taken: Features = {}
    for part, places, rows in by_part(slots):
        for name, array in parts[part].items():
            if len(places) == len(slots):
                taken[name] = np.asarray(array[rows])
                continue
            if name not in taken:
                taken[name] = np.empty((len(slots), *array.shape[1:]), array.dtype)
            taken[name][places] = array[rows]
    return taken
