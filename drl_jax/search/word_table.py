"""The table of words and frames of a page: an explanation in words that people read."""

import dataclasses

import numpy as np

from drl_jax.models.tokenizers.base import END, START
from drl_jax.search.explain import Explanation


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

    Args:
      explanation: of one query and one window.

    Returns:
      The words, without the marks of the sentence's start and end; and the marks' share of the
      score, 0 ... 1.
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
