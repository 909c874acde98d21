"""What a query finds: videos, their moments, and why."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drl_jax.models.interactions import Attribution, Features, Interaction
from drl_jax.models.tokenizers.base import END, START
from drl_jax.search.encoding import WEAK
from drl_jax.search.engine import Part
from drl_jax.search.open_index import IndexedVideo
from drl_jax.search.windows import Window


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How L tokens of a query, also start and end, and F frames at some seconds make the score."""

    words: list[str]
    times: np.ndarray
    attribution: Attribution

    @property
    def peak(self) -> float:
        """Time of the frame that contributes most, seconds."""
        return float(self.times[np.argmax(self.attribution.frame_contribution)])

    def matches(self) -> list[tuple[str, float, float, float]]:
        """For each token: the token, the time of its best frame, their cosine, its weight."""
        similarity, weight = self.attribution.similarity, self.attribution.token_weight
        best = self.times[similarity.argmax(axis=1)], similarity.max(axis=1), weight
        return list(zip(self.words, *(column.tolist() for column in best), strict=True))


def explain(
    interaction: type[Interaction], part: Part, video: Features, words: list[str], times: Sequence
) -> Explanation:
    """Explains the similarity of a window and the most similar text of a part of a query.

    `video` is arrays of the window without the axis of items, float32; `words` are the tokens of
    the longest text, and `times` those of the frames, seconds.
    """
    texts = (
        {name: array[number] for name, array in part.text.items()}
        for number in range(len(part.text["text_mask"]))
    )
    found = (interaction.attribution(text, video) for text in texts)
    best = max(found, key=lambda attribution: attribution.frame_contribution.sum())
    frames, tokens = len(best.frame_contribution), len(best.token_weight)
    return Explanation(words[:tokens], np.asarray(times[:frames]), best)


@dataclasses.dataclass(frozen=True)
class Moment:
    """A part of a video, in seconds, that answers a query.

    Attributes:
      score: similarity of its window, as evaluation computes it.
      number: of the coarse window that it was found by.
      unusual: by how many standard deviations the score is above those of captions of other
        videos; for a picture or a video as the query, above those of other windows.
    """

    start: float
    end: float
    score: float
    window: Window
    number: int
    unusual: float | None
    _explain: Callable[[], Explanation] = dataclasses.field(repr=False, compare=False)

    @functools.cached_property
    def explanation(self) -> Explanation:
        """Why the window has its score, by the first part of the query; made when it is shown."""
        return self._explain()

    @property
    def peak(self) -> float:
        """Time of the frame of the moment that contributes most to the score, seconds."""
        times = self.explanation.times
        of_frames = self.explanation.attribution.frame_contribution
        # A moment can be a part of its window.
        inside = (self.start <= times) & (times <= self.end)
        return float(times[np.where(inside, of_frames, -np.inf).argmax()])

    def to_json(self) -> dict[str, Any]:
        """The moment as `--json` prints it; times in seconds."""
        return {
            **{name: round(getattr(self, name), 3) for name in ("start", "end", "peak")},
            "score": round(self.score, 6),
            "unusual": None if self.unusual is None else round(self.unusual, 2),
            "words": [
                {"word": word, "time": round(time, 3)}
                | {"similarity": round(similarity, 4), "weight": round(weight, 4)}
                for word, time, similarity, weight in self.explanation.matches()
            ],
        }


@dataclasses.dataclass(frozen=True)
class Hit:
    """A video that a query found; the first rank is 1.

    Attributes:
      moments: the best first; none if it was not searched for.
      windows, scores: of the coarse windows, refined where they were candidates: float [W].
      is_same: whether the picture that was asked is a frame of it.
    """

    rank: int
    path: Path
    video: IndexedVideo
    moments: tuple[Moment, ...] = ()
    windows: tuple[Window, ...] = ()
    scores: np.ndarray | tuple[()] = ()
    is_same: bool = False

    @property
    def score(self) -> float:
        """Similarity of its best window."""
        return self.moments[0].score

    @property
    def is_weak(self) -> bool:
        """Whether other captions, or other windows, are about as similar."""
        unusual = self.moments[0].unusual if self.moments else None
        return unusual is not None and unusual < WEAK and not self.is_same

    def to_json(self) -> dict[str, Any]:
        """The hit as `--json` prints it."""
        return {
            "rank": self.rank,
            "score": round(self.score, 6),
            "weak": self.is_weak,
            "same_picture": self.is_same,
            "path": str(self.path),
            "duration": round(self.video.duration, 3),
            "moments": [moment.to_json() for moment in self.moments],
        }


class WordRow(NamedTuple):
    """A word, its share of the score, and its cosine with each frame, float [F]."""

    word: str
    weight: float
    similarity: np.ndarray


def word_rows(explanation: Explanation) -> tuple[list[WordRow], float]:
    """Joins tokens to words. Also returns the share of the score of the marks of start and end."""
    weights = np.asarray(explanation.attribution.token_weight, np.float64)
    words: list[tuple[str, list[int]]] = []
    marks, continues = 0.0, False
    for row, token in enumerate(explanation.words):
        if token in (START, END):
            marks += float(weights[row])
            continues = False
            continue
        if not continues:
            words.append(("", []))
        # A trailing "-" says that the word continues; the token of a hyphen alone is "-".
        continues = len(token) > 1 and token.endswith("-")
        word, rows = words[-1]
        words[-1] = (word + (token[:-1] if continues else token), [*rows, row])
    found = []
    for word, rows in words:
        total = float(weights[rows].sum())
        shares = weights[rows] / total if total > 0 else np.full(len(rows), 1 / len(rows))
        found.append(WordRow(word, total, shares @ explanation.attribution.similarity[rows]))
    return found, marks


def format_timestamp(seconds: float) -> str:
    """Formats seconds as 1:02.5, or 1:00:02.5 with hours."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"
