"""The videos of one state of an index, which are read when they are asked for."""

import collections
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from drl_jax.search.rows import IndexedVideo, ListedVideo
from drl_jax.search.store import Store

# Videos that are read at a time, and that stay in memory.
_CHUNK, _KEPT = 500, 10_000


@dataclasses.dataclass(frozen=True, eq=False)
class IndexedVideos(Sequence[IndexedVideo]):
    """Videos that can be searched, in the order of their slots.

    Opening an index reads only slots; a row with its times and windows is decoded when it is
    accessed. Safe to use from several threads.

    Attributes:
      directory: of the index.
      generation: of the array files, in which slots do not change.
      first_slots: int64 [V], ascending: the slot of the first window of each video.
      counts: int64 [V], windows of each video.
    """

    directory: Path
    generation: int
    first_slots: np.ndarray
    counts: np.ndarray
    _kept: "_Kept" = dataclasses.field(default_factory=lambda: _Kept(), repr=False)

    def __len__(self) -> int:
        return len(self.first_slots)

    @overload
    def __getitem__(self, which: int) -> IndexedVideo: ...
    @overload
    def __getitem__(self, which: slice) -> list[IndexedVideo]: ...

    def __getitem__(self, which: int | slice) -> IndexedVideo | list[IndexedVideo]:
        """Reads videos.

        Raises:
          SearchIndexError: a row is damaged, or the index was made anew meanwhile.
        """
        if isinstance(which, slice):
            return self._read(self.first_slots[which], self.counts[which])
        return self._read(self.first_slots[[which]], self.counts[[which]])[0]

    def __iter__(self) -> Iterator[IndexedVideo]:
        for chunk in self.chunks(_CHUNK):
            yield from chunk

    def chunks(self, size: int, first_slot: int = 0) -> Iterator[list[IndexedVideo]]:
        """Reads all videos from a slot on, so many at a time; they do not stay in memory.

        Raises:
          SearchIndexError: see `__getitem__`.
        """
        first = int(np.searchsorted(self.first_slots, first_slot))
        for start in range(first, len(self), size):
            rows = slice(start, start + size)
            slots, counts = self.first_slots[rows].tolist(), self.counts[rows].tolist()
            yield list(self._load(dict(zip(slots, counts, strict=True))).values())

    @property
    def slots(self) -> np.ndarray:
        """int64 [W]: the slots of all windows, ascending."""
        ends = np.cumsum(self.counts)
        return np.arange(self.windows) + np.repeat(
            self.first_slots - (ends - self.counts), self.counts
        )

    @property
    def windows(self) -> int:
        """Number of windows of all videos."""
        return self.windows_from(0)

    def windows_from(self, slot: int) -> int:
        """Number of windows of the videos from a slot on."""
        return int(self.counts[np.searchsorted(self.first_slots, slot) :].sum())

    def at_slots(self, slots: np.ndarray, most: int | None = None) -> list[IndexedVideo]:
        """The videos that windows belong to, each once, in the order of the windows.

        Args:
          slots: int [N], of windows of these videos.
          most: number of videos at most; None: all.

        Raises:
          SearchIndexError: see `__getitem__`.
        """
        numbers = np.searchsorted(self.first_slots, slots, side="right") - 1
        chosen = np.array(list(dict.fromkeys(numbers.tolist()))[:most], np.int64)
        return self._read(self.first_slots[chosen], self.counts[chosen])

    def at_path(self, path: str) -> IndexedVideo | None:
        """The video with exactly this path relative to the folder of the index; None: none has.

        Raises:
          SearchIndexError: see `__getitem__`.
        """
        with Store(self.directory) as store:
            slots = np.array(store.slots_of_path(path, self.generation), np.int64)
        found = slots[np.isin(slots, self.first_slots)]
        return self.at_slots(found)[0] if len(found) else None

    def listing(self) -> Iterator[ListedVideo]:
        """What filters need of all videos, in no order.

        Raises:
          SearchIndexError: see `__getitem__`.
        """
        with Store(self.directory) as store:
            yield from store.listing(self.generation)

    def only(self, first_slots: Sequence[int]) -> "IndexedVideos":
        """Those of the videos whose first slots are among these.

        The listing is of the current state of the index, which may have more videos.
        """
        chosen = np.isin(self.first_slots, np.asarray(first_slots, np.int64))
        return dataclasses.replace(
            self, first_slots=self.first_slots[chosen], counts=self.counts[chosen]
        )

    def _read(self, first_slots: np.ndarray, counts: np.ndarray) -> list[IndexedVideo]:
        wanted = dict(zip(first_slots.tolist(), counts.tolist(), strict=True))
        found = self._kept.get(wanted)
        missing = {slot: count for slot, count in wanted.items() if slot not in found}
        if missing:
            read = self._load(missing)
            self._kept.add(read)
            found |= read
        return [found[slot] for slot in wanted]

    def _load(self, counts: Mapping[int, int]) -> dict[int, IndexedVideo]:
        """Reads the videos with these slots and numbers of windows, in their order."""
        with Store(self.directory) as store:
            return store.videos_at(counts, self.generation)


def slots_of(videos: Sequence[IndexedVideo]) -> np.ndarray:
    """int64 [W]: the slots of all windows of some videos, in their order."""
    if isinstance(videos, IndexedVideos):
        return videos.slots
    return np.concatenate([np.arange(video.slot, video.slots.stop) for video in videos])


class _Kept:
    """The videos that were read last, by their first slots."""

    def __init__(self) -> None:
        self._videos: collections.OrderedDict[int, IndexedVideo] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, slots: Iterable[int]) -> dict[int, IndexedVideo]:
        """Those of some slots that are kept."""
        with self._lock:
            found = {slot: self._videos[slot] for slot in slots if slot in self._videos}
            for slot in found:
                self._videos.move_to_end(slot)
            return found

    def add(self, videos: Mapping[int, IndexedVideo]) -> None:
        """Keeps videos, and forgets the ones that were not used for longest."""
        with self._lock:
            self._videos.update(videos)
            while len(self._videos) > _KEPT:
                self._videos.popitem(last=False)
