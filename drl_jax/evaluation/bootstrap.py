"""Bootstrap intervals of metrics: how much they depend on which videos happen to be in a split.

The videos of the split are drawn again with replacement, each with all of its captions, since
captions of one video are not independent; for pair accuracy, the pairs of clips are drawn. The
ranks stay those in the whole gallery. The interval has the percentiles 2.5 and 97.5 of the metric
over the draws (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

A draw is a count for each video, and every metric is a function of how often each rank occurs. So
the metrics of all draws come from one matrix product: counts [R, V] by ranks of a video [V, U].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from drl_jax.evaluation.metrics import DIRECTIONS, NAMES, RECALLS, Ranks, flatten, metrics_of

RESAMPLES = 2000
_PERCENTILES = (2.5, 97.5)


class Difference(NamedTuple):
    """A metric of two models on the same queries.

    Attributes:
      one: value of the first model.
      other: value of the second model.
      low: lower bound of the 95 % interval of `other - one`.
      high: its upper bound.
      p_value: two-sided, of the hypothesis that both models are equally good.
    """

    one: float
    other: float
    low: float
    high: float
    p_value: float

    @property
    def is_more_than_luck(self) -> bool:
        """Whether the 95 % interval of the difference leaves out 0."""
        return self.low > 0 or self.high < 0


def intervals(ranks: Ranks, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """95 % intervals of the metrics.

    Args:
      ranks: of a split.
      resamples: number of draws, R.
      seed: of the draws.

    Returns:
      As `metrics.metrics_of`, with [lower, upper] in place of each value.
    """

    def bounds(draws: np.ndarray) -> list[float]:
        return np.percentile(draws, _PERCENTILES).tolist()

    return _map_metrics(bounds, _drawn_metrics(ranks, resamples, seed))


def differences(
    one: Ranks, other: Ranks, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """Compares two models on the same queries; each draw has the same videos for both.

    Args:
      one: ranks of the first model.
      other: ranks of the second model, for the same queries in the same order.
      resamples: number of draws, R.
      seed: of the draws.

    Returns:
      The differences by the names of `metrics.flatten`.
    """
    values = [flatten(metrics_of(ranks)) for ranks in (one, other)]
    draws = [flatten(_drawn_metrics(ranks, resamples, seed)) for ranks in (one, other)]
    found = {}
    # An early build of a dataset has no pairs.
    for name in (name for name in values[0] if name in values[1]):
        change = draws[1][name] - draws[0][name]
        low, high = np.percentile(change, _PERCENTILES).tolist()
        # The draws and the data itself: never 0.
        tail = 1 + min((change <= 0).sum(), (change >= 0).sum())
        p_value = min(1.0, 2 * float(tail) / (resamples + 1))
        found[name] = Difference(values[0][name], values[1][name], low, high, p_value)
    return found


def _drawn_metrics(ranks: Ranks, resamples: int, seed: int) -> dict[str, Any]:
    """As `metrics.metrics_of`, with the values of all draws, float64 [R], in place of each value.

    The draws depend on the seed and the number of videos alone, so those of two models are paired.
    """
    rng = np.random.default_rng(seed)
    videos = len(ranks.v2t)
    draws = _draw(rng, videos, resamples)
    drawn: dict[str, Any] = {
        "t2v": _metrics_of_draws(draws, ranks.t2v, ranks.text_to_video),
        "v2t": _metrics_of_draws(draws, ranks.v2t, np.arange(videos)),
    }
    if len(ranks.pair):
        pairs = _draw(rng, int(ranks.pair.max()) + 1, resamples)
        values, counts = _counts_of_draws(pairs, ranks.pair_scores, ranks.pair)
        drawn["pair_accuracy"] = 100 * (counts @ values) / counts.sum(axis=1)
    return drawn


def _draw(rng: np.random.Generator, size: int, resamples: int) -> np.ndarray:
    """How often each of N elements is in each of R draws of N of them with replacement.

    Returns:
      float32 [R, N], which holds counts exactly and multiplies fast.
    """
    drawn = rng.integers(size, size=(resamples, size)) + size * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * size)
    return counts.reshape(resamples, size).astype(np.float32)


def _counts_of_draws(
    draws: np.ndarray, values: np.ndarray, cluster: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Counts the values of each draw.

    Args:
      draws: float32 [R, V], how often each of V clusters is in each draw.
      values: float [N].
      cluster: int [N], the cluster of each value.

    Returns:
      The distinct values, ascending, [U], and how often each is in each draw, float64 [R, U].
    """
    distinct, index = np.unique(values, return_inverse=True)
    members = np.zeros((draws.shape[1], len(distinct)), np.float32)
    np.add.at(members, (cluster, index), 1)
    return distinct, (draws @ members).astype(np.float64)


def _metrics_of_draws(
    draws: np.ndarray, ranks: np.ndarray, cluster: np.ndarray
) -> dict[str, np.ndarray]:
    """The metrics of one direction, float64 [R] each."""
    values, counts = _counts_of_draws(draws, ranks, cluster)
    up_to = counts.cumsum(axis=1)
    total = up_to[:, -1]
    recalls = {f"R@{k}": 100 * counts[:, values <= k].sum(axis=1) / total for k in RECALLS}
    # The median is the mean of the elements at the positions ceil(n / 2) and floor(n / 2) + 1.
    middle = [
        values[(up_to < position[:, None]).sum(axis=1)]
        for position in (np.ceil(total / 2), np.floor(total / 2) + 1)
    ]
    return {**recalls, "MdR": (middle[0] + middle[1]) / 2, "MnR": counts @ values / total}


def _map_metrics(function: Callable[[np.ndarray], Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Applies a function to each value of `_drawn_metrics`."""
    mapped: dict[str, Any] = {
        direction: {name: function(metrics[direction][name]) for name in NAMES}
        for direction in DIRECTIONS
    }
    if "pair_accuracy" in metrics:
        mapped["pair_accuracy"] = function(metrics["pair_accuracy"])
    return mapped
