"""Filters of a search: only some videos, those in a folder, with a name, or of some length."""

import dataclasses
import datetime
import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from drl_jax.runtime.errors import UserError
from drl_jax.search.segments import Segment


class Listing(NamedTuple):
    """What filters need of V videos, ordered by path: 0.2 GB for a million.

    Attributes:
      segments: int [V], number of the segment of each.
      rows: int [V], its row there.
      paths: V paths relative to the folder of the index.
      mtimes: int64 [V], modification times, nanoseconds.
      lengths: float64 [V], seconds.
    """

    segments: np.ndarray
    rows: np.ndarray
    paths: list[str]
    mtimes: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of_segments(cls, listed: Sequence[tuple[Segment, np.ndarray, str]]) -> "Listing":
        """The videos of segments.

        Args:
          listed: of each segment, itself, bool [V]: which of its videos, and the prefix of paths.
        """
        rows = [np.flatnonzero(live) for _, live, _ in listed]
        segments = np.repeat(np.arange(len(listed)), [len(row) for row in rows])
        paths = [
            prefix + path
            for (segment, _, prefix), row in zip(listed, rows, strict=True)
            for path in segment.table.column("path").take(pa.array(row)).to_pylist()
        ]
        columns = [
            np.concatenate([s.column(name)[r] for (s, _, _), r in zip(listed, rows, strict=True)])
            for name in ("mtime_ns", "duration")
        ]
        order = np.array(sorted(range(len(paths)), key=paths.__getitem__), np.int64)
        taken = [array[order] for array in (segments, np.concatenate(rows), *columns)]
        return cls(*taken[:2], [paths[n] for n in order.tolist()], *taken[2:])

    def chosen(self, which: np.ndarray) -> "Listing":
        """Some of the videos, bool [V]."""
        paths = [self.paths[number] for number in np.flatnonzero(which)]
        segments, rows, _, mtimes, lengths = self
        return Listing(segments[which], rows[which], paths, mtimes[which], lengths[which])


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which videos are searched.

    Attributes:
      folder: below this folder, relative to that of the index; empty: all.
      name: the file name contains it, or matches it if it has `*` or `?`; case is ignored.
      min_length: seconds at least.
      max_length: seconds at most.
      since: changed on this day or later.
      until: changed on this day or earlier.
      only: paths relative to the folder of the index, the only ones; empty: all.
    """

    folder: str = ""
    name: str = ""
    min_length: float = 0.0
    max_length: float = math.inf
    since: datetime.date = datetime.date.min
    until: datetime.date = datetime.date.max
    only: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether a video can fail them."""
        return self != Filters()

    @property
    def of_properties(self) -> "Filters":
        """The filters without `only`: those by folder, name, length and day."""
        return dataclasses.replace(self, only=())

    def leaving_out(self, path: str) -> "Filters":
        """The filters with one path less in `only`."""
        rest = tuple(other for other in self.only if other != path)
        return dataclasses.replace(self, only=rest)


def passing(listing: Listing, filters: Filters) -> np.ndarray:
    """Which videos pass the filters but `only`: bool [V]."""
    found = (filters.min_length <= listing.lengths) & (listing.lengths <= filters.max_length)
    # Days of the local time of this machine.
    if filters.since > datetime.date.min:
        found &= listing.mtimes >= _midnight_ns(filters.since)
    if filters.until < datetime.date.max:
        found &= listing.mtimes < _midnight_ns(filters.until + datetime.timedelta(days=1))
    folder = filters.folder.strip("/")
    if folder:
        _restrict(found, listing.paths, lambda path: path.startswith(f"{folder}/"))
    pattern = filters.name.casefold()
    if set("*?") & set(pattern):
        # "[" is a part of many names, and no class of characters.
        matches = re.compile(fnmatch.translate(pattern.replace("[", "[[]"))).match
        _restrict(found, listing.paths, lambda path: bool(matches(_name_of(path))))
    elif pattern:
        _restrict(found, listing.paths, lambda path: pattern in _name_of(path))
    return found


def _restrict(found: np.ndarray, paths: list[str], passes: Callable[[str], bool]) -> None:
    """Leaves out those of the videos found whose paths do not pass."""
    found[found] = [passes(paths[number]) for number in np.flatnonzero(found).tolist()]


def _name_of(path: str) -> str:
    return path.rpartition("/")[2].casefold()


def _midnight_ns(day: datetime.date) -> float:
    """When a day begins in the local time of this machine, nanoseconds."""
    try:
        return datetime.datetime.combine(day, datetime.time.min).timestamp() * 1e9
    # Times of day are not defined so early or late.
    except (OSError, OverflowError, ValueError):
        return math.inf if day.year > 5000 else -math.inf


def parse_day(name: str, text: str) -> datetime.date:
    """Reads a day.

    Raises:
      UserError: it is none; `name` is in the message.
    """
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{name} takes a day as 2026-01-31, not {text[:100]!r}") from None
