"""What filters need of the videos of an index, in columns: of a million videos, 0.2 GB."""

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from drl_jax.search.rows import IndexedVideo
from drl_jax.search.slots import PART_SLOTS


class Listing(NamedTuple):
    """Columns of V videos that can be searched.

    Attributes:
      slots: int64 [V], as `IndexedVideo.slot`.
      paths: V paths relative to the folder of the videos.
      mtimes: int64 [V], modification times, nanoseconds.
      lengths: float64 [V], seconds; to the last frame if an older version stored the video.
    """

    slots: np.ndarray
    paths: list[str]
    mtimes: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of_rows(cls, rows: Iterable[tuple]) -> "Listing":
        """Reads rows of `select_listing`.

        Raises:
          TypeError, ValueError: a row is damaged.
        """
        slots, paths, mtimes, lengths = [], [], [], []
        for slot, path, mtime_ns, duration, times in rows:
            slots.append(slot)
            paths.append(path)
            mtimes.append(mtime_ns)
            lengths.append(max(json.loads(times), default=0.0) if duration is None else duration)
        return cls(
            *(np.array(slots, np.int64), paths, np.array(mtimes, np.int64)),
            np.array(lengths, np.float64),
        )

    @classmethod
    def of_videos(cls, videos: Sequence[IndexedVideo]) -> "Listing":
        """The columns of videos that were read."""
        return cls(
            np.array([video.slot for video in videos], np.int64),
            [video.path for video in videos],
            np.array([video.mtime_ns for video in videos], np.int64),
            np.array([video.length for video in videos], np.float64),
        )

    @classmethod
    def joined(cls, listings: Sequence["Listing"]) -> "Listing":
        """The videos of several listings, one after the other."""
        if len(listings) == 1:
            return listings[0]
        slots, paths, mtimes, lengths = zip(*listings, strict=True)
        return cls(
            *(np.concatenate(slots), list(itertools.chain.from_iterable(paths))),
            *(np.concatenate(mtimes), np.concatenate(lengths)),
        )

    def of_part(self, number: int, prefix: str) -> "Listing":
        """The videos of a part of an index, as those of the index; see `VideosPart`."""
        paths = [prefix + path for path in self.paths] if prefix else self.paths
        return self._replace(slots=self.slots + number * PART_SLOTS, paths=paths)

    def chosen(self, which: np.ndarray) -> "Listing":
        """Some of the videos, bool [V]."""
        paths = [self.paths[number] for number in np.flatnonzero(which)]
        return Listing(self.slots[which], paths, self.mtimes[which], self.lengths[which])
