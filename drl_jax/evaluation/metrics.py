"""Retrieval metrics of a similarity matrix, in NumPy.

Tie rule: candidates with the same similarity share the mean of their ranks, so the rank of the
correct one is 1 + the number of higher similarities + half the number of equal ones. A model that
gives every pair the same similarity gets chance, not R@1 = 100.

A new metric is a function and a row of METRICS.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

RECALLS = (1, 5, 10)
DIRECTIONS = ("t2v", "v2t")
TIE_RULE = "expected rank"

# Similarities of two clips with the same frames differ by less than this, from the order of float32
# sums.
_SAME_SIMILARITY = 1e-5


class Metric(NamedTuple):
    """A metric of one direction, for R sets of queries at once."""

    # Distinct ranks, ascending [U], and how often each occurs in each set [R, U] -> float64 [R].
    of: Callable[[np.ndarray, np.ndarray], np.ndarray]
    # A smaller value is better; otherwise it is a percentage, and a larger one is better.
    is_rank: bool = False


def _recall(k: int, ranks: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return counts[:, ranks <= k].sum(axis=1) / counts.sum(axis=1) * 100


def _median(ranks: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean of the ranks at the positions ceil(n / 2) and floor(n / 2) + 1."""
    up_to = counts.cumsum(axis=1)
    total = up_to[:, -1]
    positions = np.ceil(total / 2), np.floor(total / 2) + 1
    lower, upper = (ranks[(up_to < position[:, None]).sum(axis=1)] for position in positions)
    return (lower + upper) / 2


def _mean(ranks: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return counts @ ranks / counts.sum(axis=1)


METRICS = {
    **{f"R@{k}": Metric(functools.partial(_recall, k)) for k in RECALLS},
    "MdR": Metric(_median, is_rank=True),
    "MnR": Metric(_mean, is_rank=True),
}
# Metrics of which a smaller value is better.
RANK_METRICS = tuple(name for name, metric in METRICS.items() if metric.is_rank)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """What the metrics of a split are computed from: one rank for each query, counted from 1."""

    t2v: np.ndarray  # float64 [A], of each text's video
    v2t: np.ndarray  # float64 [B], of each video's set of texts
    text_to_video: np.ndarray  # int [A], the video of each text
    # float64 [T], of the texts of clips that have a reverse, T = 0 for most datasets: 1 if the text
    # prefers its clip, 0.5 for a tie, 0 if it prefers the reverse.
    pair_scores: np.ndarray
    pair: np.ndarray  # int [T], the pair of clips that each of these texts belongs to


def query_ranks(
    sim_matrix: np.ndarray, text_to_video: np.ndarray, reversed_pairs: np.ndarray | None = None
) -> Ranks:
    """Ranks the candidates of every query.

    Args:
      sim_matrix: float [A, B], texts by videos.
      text_to_video: int [A], the column of each text's video; every video has at least one text.
      reversed_pairs: int [P, 2], columns of clips and their reverses; None: there are none.

    Raises:
      ValueError: shapes that do not match, a video without text, or a similarity that is not
        finite.
    """
    sim_matrix, text_to_video = checked(sim_matrix, text_to_video)
    videos = np.arange(sim_matrix.shape[1])
    pairs = np.zeros((0, 2), int) if reversed_pairs is None else np.asarray(reversed_pairs)
    return Ranks(
        expected_ranks(sim_matrix, text_to_video),
        expected_ranks(caption_sets(sim_matrix, text_to_video).T, videos),
        text_to_video,
        *_pair_scores(sim_matrix, text_to_video, pairs),
    )


def checked(sim_matrix: np.ndarray, text_to_video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the arguments of `query_ranks` as arrays, or raises its errors."""
    sim_matrix, text_to_video = np.asarray(sim_matrix), np.asarray(text_to_video)
    texts, videos = sim_matrix.shape
    if text_to_video.shape != (texts,):
        raise ValueError(
            f"sim_matrix has {texts} rows, but text_to_video has shape {text_to_video.shape}"
        )
    if not np.array_equal(np.unique(text_to_video), np.arange(videos)):
        raise ValueError("text_to_video must name every column of sim_matrix and no other")
    if not np.isfinite(sim_matrix).all():
        raise ValueError("sim_matrix has values that are not finite")
    return sim_matrix, text_to_video


def caption_sets(sim_matrix: np.ndarray, text_to_video: np.ndarray) -> np.ndarray:
    """Similarity of each video's set of texts, that of its best text, to each video: [B, B]."""
    videos = sim_matrix.shape[1]
    best = np.full((videos, videos), -np.inf, sim_matrix.dtype)
    np.maximum.at(best, text_to_video, sim_matrix)
    return best


def higher_and_equal(scores: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of candidates that score higher than the correct one, and of other equal ones.

    `scores` [N, C] are queries by candidates, `correct` int [N] the columns; both are int [N].
    """
    score = np.take_along_axis(scores, correct[:, None], axis=1)
    return (scores > score).sum(axis=1), (scores == score).sum(axis=1) - 1


def expected_ranks(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Rank of the candidate `correct` of each row, float64 [N], with the tie rule above."""
    higher, equal = higher_and_equal(scores, correct)
    return 1 + higher + equal / 2


def _pair_scores(
    sim_matrix: np.ndarray, text_to_video: np.ndarray, reversed_pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`pair_scores` and `pair` of `Ranks`."""
    reverse, pair = np.full((2, sim_matrix.shape[1]), -1)
    for one, other in ((0, 1), (1, 0)):
        reverse[reversed_pairs[:, one]] = reversed_pairs[:, other]
        pair[reversed_pairs[:, one]] = np.arange(len(reversed_pairs))
    texts = np.flatnonzero(pair[text_to_video] >= 0)
    own = text_to_video[texts]
    margin = sim_matrix[texts, own] - sim_matrix[texts, reverse[own]]
    tie = np.abs(margin) <= _SAME_SIMILARITY
    return np.where(tie, 0.5, margin > 0), pair[own]


def metrics_of(ranks: Ranks) -> dict[str, Any]:
    """{"t2v": .., "v2t": ..}, each with METRICS; with pairs of clips also "pair_accuracy".

    t2v ranks the videos for each text; v2t, for each video, the sets of texts of all videos by
    their most similar text (the multi-caption protocol of the field). Pair accuracy is the
    percentage of texts that are more similar to their clip than to its reverse. A model that does
    not see the order of frames gets exactly 50: similarities within float32 rounding (1e-5) are
    ties, which count half.
    """
    metrics: dict[str, Any] = {
        direction: summary(getattr(ranks, direction)) for direction in DIRECTIONS
    }
    if len(ranks.pair_scores):
        metrics["pair_accuracy"] = float(ranks.pair_scores.mean() * 100)
    return metrics


def summary(ranks: np.ndarray) -> dict[str, float]:
    """METRICS of the ranks of one direction, [N]."""
    distinct, counts = np.unique(ranks, return_counts=True)
    return {name: float(metric.of(distinct, counts[None])[0]) for name, metric in METRICS.items()}


def flatten(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `metrics_of`, or of its intervals, by name: "t2v R@1", .., "pair accuracy"."""
    values = {f"{way} {name}": metrics[way][name] for way in DIRECTIONS for name in METRICS}
    if "pair_accuracy" in metrics:
        values["pair accuracy"] = metrics["pair_accuracy"]
    return values


def format_table(metrics: Mapping[str, Any], intervals: Mapping[str, Any] | None = None) -> str:
    """Formats both directions as a table, with the `bootstrap.intervals` beside the values."""

    def cell(value: float, bounds: tuple[float, float] | None) -> str:
        return f"{value:.1f}" + ("" if bounds is None else f" [{bounds[0]:.1f}, {bounds[1]:.1f}]")

    rows = []
    for direction in DIRECTIONS:
        values, bounds = metrics[direction], (intervals or {}).get(direction, {})
        rows.append([cell(values[name], bounds.get(name)) for name in METRICS])
    columns = list(zip(METRICS, *rows, strict=True))
    widths = [max(8, 3 + max(map(len, column))) for column in columns]
    lines = [
        f"{label:<6}" + "".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True))
        for label, row in zip(("", *DIRECTIONS), zip(*columns, strict=True), strict=True)
    ]
    if "pair_accuracy" in metrics:
        bounds = (intervals or {}).get("pair_accuracy")
        lines.append(f"pair accuracy {cell(metrics['pair_accuracy'], bounds)} (chance 50)")
    return "\n".join(lines)
