"""Filters of a search: only videos in a folder, with a name, or of some length."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable

from drl_jax.search.rows import IndexedVideo


@dataclasses.dataclass(frozen=True)
class Filters:
    """Which videos are searched.

    Attributes:
      folder: below this folder, relative to that of the index; empty: all.
      name: the file name contains it, or matches it if it has `*` or `?`; case is ignored.
      min_length: seconds at least.
      max_length: seconds at most.
    """

    folder: str = ""
    name: str = ""
    min_length: float = 0.0
    max_length: float = math.inf

    def __bool__(self) -> bool:
        """Whether a video can fail them."""
        return self != Filters()


def filter_videos(videos: Iterable[IndexedVideo], filters: Filters) -> list[IndexedVideo]:
    """The videos that pass, in their order."""
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
        and filters.min_length <= length_of(video) <= filters.max_length
    ]


def length_of(video: IndexedVideo) -> float:
    """Length of a video, seconds; to its last frame if an older version stored it."""
    return video.duration or max((window.end for window in video.windows), default=0.0)
