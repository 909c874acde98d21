"""The metrics as DRL's PyTorch original and CLIP4Clip compute them, for comparison with papers.

They differ from `metrics.py` in queries with ties:

- One caption a video: a query has every rank that its correct candidate could take among its
  equals, and all of them are averaged. MSR-VTT 1k-A repeats 5 of its 1,000 captions, so v2t has
  1,012 ranks. A model that gives every pair the same similarity gets N ranks for each query.
- Several captions a video: t2v gives the first of equal candidates the first of their ranks, and
  takes the lower of two middle ranks as the median. v2t is as above, over sets of captions.
"""

from typing import Any

import numpy as np

from drl_jax.evaluation.metrics import caption_sets, checked, higher_and_equal, summary


def legacy_metrics(sim_matrix: np.ndarray, text_to_video: np.ndarray) -> dict[str, Any]:
    """{"t2v": .., "v2t": ..}, each with METRICS and the numbers of `queries` and averaged `ranks`.

    Arguments and errors are those of `metrics.query_ranks`.
    """
    sim_matrix, text_to_video = checked(sim_matrix, text_to_video)
    texts, videos = sim_matrix.shape
    v2t = _all_ranks(caption_sets(sim_matrix, text_to_video).T, np.arange(videos))
    is_square = texts == videos
    t2v = (_all_ranks if is_square else _first_ranks)(sim_matrix, text_to_video)
    metrics = {
        "t2v": {**summary(t2v), "queries": texts, "ranks": len(t2v)},
        "v2t": {**summary(v2t), "queries": videos, "ranks": len(v2t)},
    }
    if not is_square:
        metrics["t2v"]["MdR"] = float(np.sort(t2v)[(len(t2v) - 1) // 2])
    return metrics


def _all_ranks(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Every rank that the correct candidate of a row could take among its equals, int [M]."""
    higher, equal = higher_and_equal(scores, correct)
    counts = equal + 1
    # Position of each rank among those of its query: 0, 1, ..
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return 1 + np.repeat(higher, counts) + np.arange(counts.sum()) - starts


def _first_ranks(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Rank of the correct candidate of each row in a sort that keeps the order of equals."""
    # PyTorch's sort, which the original calls, may order equals in another way.
    higher, _ = higher_and_equal(scores, correct)
    score = np.take_along_axis(scores, correct[:, None], axis=1)
    before = np.arange(scores.shape[1]) < correct[:, None]
    return 1 + higher + ((scores == score) & before).sum(axis=1)
