"""Filters of a search: only some videos, those in a folder, with a name, or of some length."""

import dataclasses
import datetime
import fnmatch
import math
from collections.abc import Iterable

from drl_jax.runtime.errors import UserError
from drl_jax.search.rows import IndexedVideo


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


def filter_videos(videos: Iterable[IndexedVideo], filters: Filters) -> list[IndexedVideo]:
    """The videos that pass, in their order.

    Raises:
      UserError: one of `only` is not among the videos.
    """
    if filters.only:
        names = set(filters.only)
        videos = [video for video in videos if video.path in names]
        if unknown := names - {video.path for video in videos}:
            raise UserError(f"no video of the index has the path {min(unknown)[:200]!r}")
    folder = filters.folder.strip("/")
    prefix = f"{folder}/" if folder else ""
    pattern = filters.name.casefold()
    if not set("*?") & set(pattern):
        # "[" is a part of many names, and no class of characters.
        pattern = f"*{pattern}*"
    pattern = pattern.replace("[", "[[]")
    return [
        video
        for video in videos
        if video.path.startswith(prefix)
        and fnmatch.fnmatchcase(video.path.rpartition("/")[2].casefold(), pattern)
        and filters.min_length <= video.length <= filters.max_length
        and filters.since <= day_of(video) <= filters.until
    ]


def day_of(video: IndexedVideo) -> datetime.date:
    """The day on which a file was changed, in the local time of this machine."""
    return datetime.date.fromtimestamp(video.mtime_ns / 1e9)


def parse_day(name: str, text: str) -> datetime.date:
    """Reads a day.

    Raises:
      UserError: it is none; `name` is in the message.
    """
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{name} takes a day as 2026-01-31, not {text[:100]!r}") from None
