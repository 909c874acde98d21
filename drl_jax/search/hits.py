"""What a query finds: videos, their moments, and why."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.models.interactions import Attribution, Features, Interaction
from drl_jax.models.tokenizers.base import END, START
from drl_jax.search.encoding import WEAK
from drl_jax.search.engine import Part
from drl_jax.search.open_index import IndexedVideo
from drl_jax.search.windows import Window


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Tokens and frames of one query and one window.

    Attributes:
      words: L tokens of the query, with those of its start and end: they are compared too, and a
        model may give them most of the weight.
      times: float [F], times of the frames, seconds.
      attribution: how they contribute to the score.
    """

    words: list[str]
    times: np.ndarray
    attribution: Attribution

    @property
    def peak(self) -> float:
        """Time of the frame that contributes most, seconds."""
        return float(self.times[np.argmax(self.attribution.frame_contribution)])

    def matches(self) -> list[tuple[str, float, float, float]]:
        """For each token: the token, the time of its best frame, their cosine, its weight."""
        similarity, weights = self.attribution.similarity, self.attribution.token_weight
        best = similarity.argmax(axis=1)
        return [
            (word, float(self.times[frame]), float(similarity[row, frame]), float(weight))
            for row, (word, frame, weight) in enumerate(zip(self.words, best, weights, strict=True))
        ]


def explain(
    interaction: type[Interaction],
    part: Part,
    video: Features,
    words: list[str],
    times: tuple[float, ...],
) -> Explanation:
    """Explains the similarity of a part of a query and a window.

    Args:
      interaction: of the model.
      part: of several texts, the one with the largest similarity counts.
      video: arrays of the window, without the axis of items, float32.
      words: tokens of the texts, with start and end; those behind a text's last are left out.
      times: of the frames of the window, seconds.
    """
    texts = range(len(part.text["text_mask"]))
    found = [
        interaction.attribution({name: array[n] for name, array in part.text.items()}, video)
        for n in texts
    ]
    best = max(found, key=lambda attribution: attribution.frame_contribution.sum())
    frames, tokens = len(best.frame_contribution), len(best.token_weight)
    return Explanation(words[:tokens], np.asarray(times[:frames]), best)


@dataclasses.dataclass(frozen=True)
class Moment:
    """A part of a video that answers a query.

    Attributes:
      start: seconds.
      end: seconds.
      score: similarity of its window, as evaluation computes it.
      window: the window that has this score.
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
    _explain: Any = dataclasses.field(repr=False, compare=False)

    @functools.cached_property
    def explanation(self) -> Explanation:
        """Why the window has its score, by the first part of the query; made when it is shown."""
        return self._explain()

    @property
    def peak(self) -> float:
        """Time of the frame of the moment that contributes most to the score, seconds."""
        times = self.explanation.times
        # A moment can be a part of its window.
        inside = (self.start <= times) & (times <= self.end)
        of_frames = self.explanation.attribution.frame_contribution
        return float(times[np.where(inside, of_frames, -np.inf).argmax()])

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
      moments: its best parts, the best first; none if it was not searched for.
      windows: W windows: the coarse ones, refined where they were candidates.
      scores: float [W].
      is_same: whether the picture that was asked is a frame of it.
    """

    rank: int
    path: Path
    video: IndexedVideo
    moments: tuple[Moment, ...] = ()
    windows: tuple[Window, ...] = ()
    scores: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
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


@dataclasses.dataclass(frozen=True)
class WordRow:
    """A word of the query.

    Attributes:
      word: as people write it: tokens of one word are joined.
      weight: its share of the score, the sum over its tokens.
      similarity: float [F], cosine with each frame, the mean over its tokens by their weights.
    """

    word: str
    weight: float
    similarity: np.ndarray


def word_rows(explanation: Explanation) -> tuple[list[WordRow], float]:
    """Joins tokens to words.

    Returns:
      The words, without the marks of the sentence's start and end; and the marks' share of the
      score, 0 to 1.
    """
    weights = explanation.attribution.token_weight
    similarity = explanation.attribution.similarity
    words: list[tuple[str, list[int]]] = []
    marks, continues = 0.0, False
    for row, token in enumerate(explanation.words):
        if token in (START, END):
            marks += float(weights[row])
            continues = False
            continue
        # A trailing "-" says that the word continues; the token of a hyphen alone is "-".
        more = len(token) > 1 and token.endswith("-")
        text = token[:-1] if more else token
        if continues:
            word, rows = words[-1]
            words[-1] = (word + text, [*rows, row])
        else:
            words.append((text, [row]))
        continues = more
    return [_joined(word, rows, weights, similarity) for word, rows in words], marks


def _joined(word: str, rows: list[int], weights: np.ndarray, similarity: np.ndarray) -> WordRow:
    shares = np.asarray(weights, np.float64)[rows]
    total = float(shares.sum())
    shares = shares / total if total > 0 else np.full(len(rows), 1 / len(rows))
    return WordRow(word, total, shares @ similarity[rows])


def format_timestamp(seconds: float) -> str:
    """Formats seconds as 1:02.5, or 1:00:02.5 with hours."""
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:04.1f}"
    return f"{minutes}:{rest:04.1f}"
