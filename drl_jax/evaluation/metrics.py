"""Retrieval metrics of a similarity matrix, in NumPy.

Tie rule: candidates with the same similarity share the mean of their ranks, so the rank of the
correct one is 1 + the number of higher similarities + half the number of equal ones. A model that
gives every pair the same similarity gets chance, not R@1 = 100.
"""

from collections.abc import Mapping

import numpy as np

RECALLS = (1, 5, 10)
NAMES = ("R@1", "R@5", "R@10", "MdR", "MnR")

# Similarities of two clips with the same frames differ by less than this, from the order of float32
# sums.
_SAME_SIMILARITY = 1e-5


def retrieval_metrics(
    sim_matrix: np.ndarray, text_to_video: np.ndarray
) -> dict[str, dict[str, float]]:
    """Computes the metrics of both directions.

    Args:
      sim_matrix: float [A, B], texts by videos.
      text_to_video: int [A], the column of each text's video; every video has at least one text.

    Returns:
      {"t2v": .., "v2t": ..}, each with R@1, R@5, R@10 in percent and the median and mean rank,
      counted from 1. t2v ranks the videos for each text. v2t ranks, for each video, the sets of
      texts of all videos by their most similar text (the multi-caption protocol of the field).

    Raises:
      ValueError: shapes that do not match, a video without text, or a similarity that is not
        finite.
    """
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
    t2v = _ranks(sim_matrix, text_to_video)

    best = np.full((videos, videos), -np.inf, sim_matrix.dtype)  # sets of texts by videos
    np.maximum.at(best, text_to_video, sim_matrix)
    v2t = _ranks(best.T, np.arange(videos))
    return {"t2v": _summary(t2v), "v2t": _summary(v2t)}


def _ranks(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Rank of the candidate `correct` of each row [N, C], with the tie rule above."""
    score = np.take_along_axis(scores, correct[:, None], axis=1)
    higher = (scores > score).sum(axis=1)
    equal = (scores == score).sum(axis=1) - 1
    return 1 + higher + equal / 2


def _summary(ranks: np.ndarray) -> dict[str, float]:
    recalls = {f"R@{k}": float((ranks <= k).mean() * 100) for k in RECALLS}
    return {**recalls, "MdR": float(np.median(ranks)), "MnR": float(ranks.mean())}


def pair_accuracy(
    sim_matrix: np.ndarray, text_to_video: np.ndarray, reversed_pairs: np.ndarray
) -> float:
    """Percentage of texts that are more similar to their clip than to the same clip in reverse.

    Chance is 50, and a model that does not see the order of frames gets exactly 50: similarities
    within float32 rounding (1e-5) are ties, which count half.

    Args:
      sim_matrix: float [A, B].
      text_to_video: int [A].
      reversed_pairs: int [P, 2], P >= 1, columns of clips and their reverses.
    """
    scores = []
    for pair in np.asarray(reversed_pairs):
        for own, other in (pair, pair[::-1]):
            margin = (
                sim_matrix[text_to_video == own][:, own]
                - (sim_matrix[text_to_video == own][:, other])
            )
            tie = np.abs(margin) <= _SAME_SIMILARITY
            scores.extend(np.where(tie, 0.5, margin > 0))
    return float(np.mean(scores) * 100)


def format_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Formats both directions as a table."""
    lines = ["      " + "".join(f"{name:>8}" for name in NAMES)]
    for direction in ("t2v", "v2t"):
        values = "".join(f"{metrics[direction][name]:8.1f}" for name in NAMES)
        lines.append(f"{direction:<6}{values}")
    if "pair_accuracy" in metrics:
        lines.append(f"pair accuracy {metrics['pair_accuracy']:.1f} (chance 50)")
    return "\n".join(lines)
