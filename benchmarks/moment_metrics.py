"""Metrics of found moments against true ones. Needs numpy only.

A query has found moments, the best first, and true ones. Both are rows of [film, start, end],
seconds. Moments of two films have nothing in common.
"""

import numpy as np

# Found moments that count for the average precision of a query, as in QVHighlights.
PREDICTIONS = 10
_AP_THRESHOLDS = np.linspace(0.5, 0.95, 10).round(2)


def overlaps(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Intersection over union of found and true moments: float64 [F, 3], [T, 3] -> [F, T]."""
    first, other = found[:, None], true[None]
    shared = np.minimum(first[..., 2], other[..., 2]) - np.maximum(first[..., 1], other[..., 1])
    shared = np.where(first[..., 0] == other[..., 0], np.maximum(shared, 0.0), 0.0)
    lengths = (first[..., 2] - first[..., 1]) + (other[..., 2] - other[..., 1])
    return shared / (lengths - shared)


def recall(overlap: np.ndarray, top: int, threshold: float) -> bool:
    """Whether one of the `top` best moments overlaps a true one by the threshold: [F, T] -> bool.

    With `top` = 1 it is R@1 of QVHighlights and, with one true moment, of Charades-STA.
    """
    return bool((overlap[:top] >= threshold).any())


def average_precision(overlap: np.ndarray, threshold: float) -> float:
    """Interpolated average precision of one query at one IoU, as QVHighlights computes it.

    In the order of the scores, each of the first `PREDICTIONS` found moments takes the true one
    that it overlaps most among those that are not taken and that it overlaps by the threshold; it
    is wrong if there is none. After n moments, with c of them right and T true ones, the recall is
    r_n = c / T and the precision p_n = c / n. With r_0 = 0,

        AP = sum over n of (r_n - r_(n-1)) * max over m >= n of p_m

    This is `compute_average_precision_detection` of github.com/jayleicn/moment_detr, which is that
    of ActivityNet.

    Args:
      overlap: float [F, T], T at least 1.
      threshold: the least IoU.
    """
    overlap = overlap[:PREDICTIONS]
    is_taken = np.zeros(overlap.shape[1], bool)
    is_right = np.zeros(len(overlap), bool)
    for row, values in enumerate(overlap):
        free = np.where(is_taken, -1.0, values)
        best = int(free.argmax())
        if free[best] >= threshold:
            is_taken[best] = is_right[row] = True
    right = np.cumsum(is_right)
    precision = right / np.arange(1, len(right) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float((best_from_here * is_right).sum() / len(is_taken))


def mean_average_precision(overlap: np.ndarray) -> float:
    """The mean of `average_precision` at IoU 0.5, 0.55, ..., 0.95."""
    return float(np.mean([average_precision(overlap, value) for value in _AP_THRESHOLDS]))


def centre_error(found: np.ndarray, true: np.ndarray) -> float:
    """Seconds from the middle of the best moment to the nearest middle of a true one in its film.

    Args:
      found: [F, 3], F at least 1.
      true: [T, 3].

    Returns:
      Infinity if the best moment is in a film without a true one.
    """
    film, start, end = found[0]
    same = true[true[:, 0] == film]
    if not len(same):
        return float("inf")
    return float(np.abs(same[:, 1:].mean(1) - (start + end) / 2).min())


def is_inside(found: np.ndarray, true: np.ndarray) -> bool:
    """Whether the middle of the best moment is in a true one: [F, 3], [T, 3] -> bool."""
    film, start, end = found[0]
    middle = (start + end) / 2
    return bool(((true[:, 0] == film) & (true[:, 1] <= middle) & (middle < true[:, 2])).any())


def summary(found: list[np.ndarray], true: list[np.ndarray]) -> dict[str, float]:
    """All metrics of Q queries.

    Args:
      found: Q arrays [F, 3], F at least 1.
      true: Q arrays [T, 3], T at least 1.

    Returns:
      By name: R@1 and R@5 at IoU 0.3, 0.5 and 0.7, the mAP, and `inside`, the share of the queries
      whose best moment has its middle in a true one, in percent; the median centre error, seconds.
    """
    pairs = list(zip(found, true, strict=True))
    tables = [overlaps(*pair) for pair in pairs]
    row = {
        f"R{top}@{threshold}": _percent([recall(table, top, threshold) for table in tables])
        for top in (1, 5)
        for threshold in (0.3, 0.5, 0.7)
    }
    row["mAP"] = _percent([mean_average_precision(table) for table in tables])
    row["inside"] = _percent([is_inside(*pair) for pair in pairs])
    row["centre_s"] = round(float(np.median([centre_error(*pair) for pair in pairs])), 2)
    return row


def _percent(values: list) -> float:
    return round(100 * float(np.mean(values)), 1)
