"""Splits of a dataset: their videos, and captions that are read when they are accessed."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class CaptionOrigin:
    """Where the captions of a stored split come from, and the SHA-256 of their file."""

    directory: Path
    split: str
    sha256: str


@dataclasses.dataclass(frozen=True, eq=False)
class Captions(Sequence[list[str]]):
    """The captions of each video of a split: a sequence of V lists of strings.

    A *pair* is a caption with its video. Pairs are numbered from 0 in the order of the videos.

    Attributes:
      texts: T captions, those of the stored split; the captions of this one are among them.
      starts: int64 [V], index into `texts` of the first caption of each video.
      offsets: int64 [V + 1], number of pairs before each video, and of all pairs.
      origin: where `texts` are stored; None: only in memory.
    """

    texts: Sequence[str]
    starts: np.ndarray
    offsets: np.ndarray
    origin: CaptionOrigin | None = None

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]]) -> "Captions":
        """Captions in memory, from a list for each video."""
        offsets = offsets_of([len(sentences) for sentences in captions])
        return cls(list(itertools.chain.from_iterable(captions)), offsets[:-1], offsets)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int | slice) -> list[str] | list[list[str]]:
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        row = range(len(self))[index]
        start, count = int(self.starts[row]), int(self.offsets[row + 1] - self.offsets[row])
        return list(self.texts[start : start + count])

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return int(self.offsets[-1])

    def locate(self, pair: int) -> tuple[int, int]:
        """The row of a pair's video, and the index of its caption in `texts`."""
        row = int(np.searchsorted(self.offsets, pair, side="right")) - 1
        return row, int(self.starts[row] + pair - self.offsets[row])

    def caption(self, pair: int) -> str:
        """The caption of a pair."""
        return self.texts[self.locate(pair)[1]]

    def subset(self, rows: np.ndarray, *, first_only: bool = False) -> "Captions":
        """The captions, or only the first one, of the videos with indices int [W]."""
        counts = np.ones(len(rows), np.int64)
        if not first_only:
            counts = self.offsets[rows + 1] - self.offsets[rows]
        return Captions(self.texts, self.starts[rows], offsets_of(counts), self.origin)


def offsets_of(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Numbers before each part, and of all, int64 [N + 1], of the numbers in each of N parts."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(np.asarray(counts, np.int64), out=offsets[1:])
    return offsets


@dataclasses.dataclass(frozen=True)
class Split:
    """Videos of a split and their captions.

    Attributes:
      videos: int32 [V], record indices of the videos.
      captions: the captions of each video, at least one.
      reversed_pairs: int32 [P, 2], indices into `videos` of a clip and its time reversal, or
        another order of its frames (P = 0 for most datasets).
    """

    videos: np.ndarray
    captions: Captions
    reversed_pairs: np.ndarray

    def caption_pairs(self) -> tuple[np.ndarray, list[str]]:
        """All (video, caption) pairs, in memory: for splits that are evaluated.

        Returns:
          caption_to_video int32 [N], the index into `videos` of each caption, and the N captions.
        """
        videos = np.arange(len(self.videos), dtype=np.int32)
        caption_to_video = np.repeat(videos, self.caption_counts())
        return caption_to_video, list(itertools.chain.from_iterable(self.captions))

    def caption_counts(self) -> np.ndarray:
        """Number of captions of each video, int64 [V]."""
        return np.diff(self.captions.offsets)
