"""The videos of one state of an index, which are read when they are asked for."""

import collections
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from drl_jax.search.listing import Listing
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.slots import PART_SLOTS, by_part, slots_of_windows
from drl_jax.search.store import Store

# Videos that are read at a time, and that stay in memory.
_CHUNK, _KEPT = 500, 10_000


class VideosPart(NamedTuple):
    """Where the videos of a part of an index are read.

    Attributes:
      directory: of the part; that of the index if it has only one.
      generation: of the array files, in which slots do not change.
      prefix: what the paths have before those that the part stores, e.g. "disk1/"; may be empty.
    """

    directory: Path
    generation: int
    prefix: str = ""

    def shown(self, video: IndexedVideo, number: int) -> IndexedVideo:
        """A video of the part, which is the `number`-th, as one of the index."""
        if not number and not self.prefix:
            return video
        slot = None if video.slot is None else number * PART_SLOTS + video.slot
        return dataclasses.replace(video, path=self.prefix + video.path, slot=slot)

    def stored(self, video: IndexedVideo) -> IndexedVideo:
        """The reverse of `shown`."""
        path, slot = video.path[len(self.prefix) :], video.slot % PART_SLOTS
        return dataclasses.replace(video, path=path, slot=slot)


@dataclasses.dataclass(frozen=True, eq=False)
class IndexedVideos(Sequence[IndexedVideo]):
    """Videos that can be searched, in the order of their slots.

    Opening an index reads only slots; a row with its times and windows is decoded when it is
    accessed. Safe to use from several threads.

    Attributes:
      parts: of the index.
      first_slots: int64 [V], ascending: the slot (`slots.py`) of the first window of each video.
      counts: int64 [V], windows of each video.
    """

    parts: tuple[VideosPart, ...]
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
        return slots_of_windows(self.first_slots, self.counts)

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
        for number, part in enumerate(self.parts):
            if not path.startswith(part.prefix):
                continue
            with Store(part.directory) as store:
                inner = path[len(part.prefix) :]
                rows = store.slots_of_paths([inner], part.generation)[inner]
            slots = np.array([slot for slot, _ in rows], np.int64) + number * PART_SLOTS
            found = slots[np.isin(slots, self.first_slots)]
            if len(found):
                return self.at_slots(found)[0]
        return None

    def slots_of_windows(self, windows: Sequence[tuple[str, str, int]]) -> np.ndarray:
        """Slots of windows of these videos, without those that these videos do not have.

        Args:
          windows: path, SHA-256 of the file, and number of each window.

        Returns:
          int64 [N], in the order of the windows, each once.

        Raises:
          SearchIndexError: see `__getitem__`.
        """
        of_paths: dict[str, list[tuple[int, str]]] = {path: [] for path, _, _ in windows}
        for number, part in enumerate(self.parts):
            inner = {p[len(part.prefix) :]: p for p in of_paths if p.startswith(part.prefix)}
            with Store(part.directory) as store:
                found = store.slots_of_paths(list(inner), part.generation)
            for name, rows in found.items():
                of_paths[inner[name]] += [(slot + number * PART_SLOTS, sha) for slot, sha in rows]
        counts = self._counts_at({slot for found in of_paths.values() for slot, _ in found})
        slots = {
            slot + number: None
            for path, sha256, number in windows
            for slot, stored in of_paths[path]
            if stored == sha256 and number < counts.get(slot, 0)
        }
        return np.array(list(slots), np.int64)

    def _counts_at(self, first_slots: Iterable[int]) -> dict[int, int]:
        """Numbers of windows of those of some first slots that these videos have."""
        slots = np.array(sorted(first_slots), np.int64)
        rows = np.minimum(np.searchsorted(self.first_slots, slots), len(self.first_slots) - 1)
        here = self.first_slots[rows] == slots
        return dict(zip(slots[here].tolist(), self.counts[rows[here]].tolist(), strict=True))

    def listing(self) -> Listing:
        """What filters need of all videos, in no order; reads a row of each.

        Raises:
          SearchIndexError: see `__getitem__`.
        """
        listings = []
        for number, part in enumerate(self.parts):
            with Store(part.directory) as store:
                listings.append(store.listing(part.generation).of_part(number, part.prefix))
        listing = Listing.joined(listings)
        # The listing is of the current state of the index, which may have more videos.
        is_own = np.isin(listing.slots, self.first_slots)
        return listing if is_own.all() else listing.chosen(is_own)

    def only(self, first_slots: Sequence[int]) -> "IndexedVideos":
        """Those of the videos whose first slots are among these."""
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
        found, slots = {}, list(counts)
        for number, places, rows in by_part(slots):
            part, chosen = self.parts[number], [slots[place] for place in places.tolist()]
            of_part = {row: counts[slot] for row, slot in zip(rows.tolist(), chosen, strict=True)}
            with Store(part.directory) as store:
                videos = store.videos_at(of_part, part.generation)
            for row, slot in zip(of_part, chosen, strict=True):
                found[slot] = part.shown(videos[row], number)
        return {slot: found[slot] for slot in slots}


def slots_of(videos: Sequence[IndexedVideo]) -> np.ndarray:
    """int64 [W]: the slots of all windows of some videos, in their order."""
    if isinstance(videos, IndexedVideos):
        return videos.slots
    return np.concatenate([np.arange(video.slot, video.slots.stop) for video in videos])


def count_windows(videos: Sequence[IndexedVideo]) -> int:
    """Number of windows of some videos."""
    if isinstance(videos, IndexedVideos):
        return videos.windows
    return sum(len(video.windows) for video in videos)


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
