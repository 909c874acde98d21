"""Filters of a search: only some videos, those in a folder, with a name, or of some length."""

import contextlib
import dataclasses
import datetime
import fnmatch
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from drl_jax.runtime.errors import UserError
from drl_jax.search.segments import Listed

# Videos in the natural order of paths, clip2 before clip10; each has its number of the segment, and
# its row there.
Listing: TypeAlias = pa.Table
_NUMBER = re.compile("[0-9]+")
_COLUMNS = ["path", "mtime_ns", "duration", "segment", "row"]


def list_videos(segments: Sequence[Listed], rows: Sequence[Sequence[int]]) -> Listing:
    """The videos in some rows of each segment, with what filters need of them."""
    tables = []
    for number, (one, chosen) in enumerate(zip(segments, rows, strict=True)):
        chosen = pa.array(chosen, pa.int64())
        path, *others = one.segment.table.select(["path", "mtime_ns", "duration"]).take(chosen)
        prefix, end = (pa.scalar(text, pa.large_string()) for text in (one.prefix, ""))
        path = pc.binary_join_element_wise(prefix, path, end)
        of_segment = np.full(len(chosen), number)
        tables.append(pa.table([path, *others, of_segment, chosen], _COLUMNS))
    listing = pa.concat_tables(tables)
    keys = [natural_key(path) for path in listing["path"].to_pylist()]
    return listing.take(sorted(range(len(keys)), key=keys.__getitem__)).combine_chunks()


def natural_key(path: str) -> tuple[str, str]:
    """Orders paths by their numbers, of up to 20 digits, and equal ones by their digits."""
    return _NUMBER.sub(lambda match: match[0].zfill(20), path), path


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which videos are searched. Paths are relative to the folder of the index."""

    folder: str = ""  # Below this one.
    name: str = ""  # The file name contains it, or matches `*` and `?`; case is ignored.
    min_length: float = 0.0  # Seconds.
    max_length: float = math.inf
    since: datetime.date = datetime.date.min  # Days of the last change, both included.
    until: datetime.date = datetime.date.max
    only: tuple[str, ...] = ()  # The paths of all videos that are searched; empty: all.

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, expected = getattr(self, field.name), type(field.default)
            accepted = numbers.Real if expected is float else expected
            parts = value if isinstance(value, tuple) else ()
            is_wrong = not isinstance(value, accepted) or value != value
            # A datetime is a date, and cannot be compared with one.
            if is_wrong or isinstance(value, datetime.datetime) or set(map(type, parts)) - {str}:
                what = {str: "a string", float: "a number of seconds", tuple: "a tuple of paths"}
                what = what.get(expected, "a datetime.date")
                raise UserError(f"Filters: {field.name} is {what}, not {value!r}")

    def __bool__(self) -> bool:
        """Whether a video can fail them."""
        return self != Filters()

    @property
    def of_properties(self) -> "Filters":
        """The filters without `only`: those by folder, name, length and day."""
        return dataclasses.replace(self, only=())

    def within(self, paths: Iterable[str]) -> "Filters":
        return dataclasses.replace(self, only=tuple(paths))

    def leaving_out(self, path: str) -> "Filters":
        return self.within(other for other in self.only if other != path)


def passing(listing: Listing, filters: Filters) -> Listing:
    """The videos of a list that pass the filters but `only`."""
    lengths, times = (listing[name].to_numpy() for name in ("duration", "mtime_ns"))
    found = (filters.min_length <= lengths) & (lengths <= filters.max_length)
    # Days of the local time of this machine.
    if filters.since > datetime.date.min:
        found &= times >= _midnight_ns(filters.since)
    if filters.until < datetime.date.max:
        found &= times < _midnight_ns(filters.until + datetime.timedelta(days=1))
    listing = listing.filter(pa.array(found))
    if folder := filters.folder.strip("/"):
        listing = listing.filter(pc.starts_with(listing["path"], f"{folder}/"))
    if name := filters.name.casefold():
        # "[" is a part of many names, and no class of characters.
        matches = re.compile(fnmatch.translate(name.replace("[", "[[]"))).match
        is_pattern = bool(set("*?") & set(name))
        names = (path.rpartition("/")[2].casefold() for path in listing["path"].to_pylist())
        chosen = [bool(matches(one)) if is_pattern else name in one for one in names]
        listing = listing.filter(pa.array(chosen, pa.bool_()))
    return listing


def _midnight_ns(day: datetime.date) -> float:
    return datetime.datetime.combine(day, datetime.time.min).timestamp() * 1e9


def parse_day(name: str, text: str) -> datetime.date:
    """Reads a day; raises a UserError that has `name` if it is none."""
    with contextlib.suppress(ValueError):
        day = datetime.date.fromisoformat(text)
        if 1 < day.year < 9999:  # Of others, there is no time of day.
            return day
    raise UserError(f"{name} takes a day as 2026-01-31, not {text[:100]!r}")
