"""What a query finds: videos, and their moments."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.search.calibration import WEAK
from drl_jax.search.explain import Explanation
from drl_jax.search.rows import IndexedVideo


@dataclasses.dataclass(frozen=True)
class Moment:
    """A part of a video that answers a query.

    Attributes:
      start: seconds.
      end: seconds.
      peak: time of the frame that contributes most to the score, seconds.
      score: similarity of its best window, as evaluation computes it.
      window: index of its best window.
      explanation: of its best window, by the first part of the query.
      unusual: by how many standard deviations the score is above that of captions of other videos;
        None if the query is not one sentence, or an earlier version made the index.
    """

    start: float
    end: float
    peak: float
    score: float
    window: int
    explanation: Explanation
    unusual: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The moment as `--json` prints it; times in seconds."""
        return {
            "start": round(self.start, 3),
            "end": round(self.end, 3),
            "peak": round(self.peak, 3),
            "score": round(self.score, 6),
            "unusual": None if self.unusual is None else round(self.unusual, 2),
            "words": [
                {
                    "word": word,
                    "time": round(time, 3),
                    "similarity": round(similarity, 4),
                    "weight": round(weight, 4),
                }
                for word, time, similarity, weight in self.explanation.matches()
            ],
        }


@dataclasses.dataclass(frozen=True)
class Hit:
    """A video that a query found.

    Attributes:
      rank: from 1.
      path: of the file.
      video: the file in the index.
      moments: its best parts, the best first; at least one.
      scores: float32 [W], of all its windows.
    """

    rank: int
    path: Path
    video: IndexedVideo
    moments: tuple[Moment, ...]
    scores: np.ndarray

    @property
    def score(self) -> float:
        """Similarity of its best window."""
        return self.moments[0].score

    @property
    def is_weak(self) -> bool:
        """Whether captions of other videos are about as similar to the video."""
        return self.moments[0].unusual is not None and self.moments[0].unusual < WEAK

    def to_json(self) -> dict[str, Any]:
        """The hit as `--json` prints it."""
        return {
            "rank": self.rank,
            "score": round(self.score, 6),
            "weak": self.is_weak,
            "path": str(self.path),
            "duration": round(self.video.duration, 3),
            "moments": [moment.to_json() for moment in self.moments],
        }
