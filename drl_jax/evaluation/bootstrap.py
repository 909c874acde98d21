"""Bootstrap intervals of metrics: how much they depend on which videos happen to be in a split.

The videos of the split are drawn again with replacement, each with all of its captions, since
captions of one video are not independent; for pair accuracy, the pairs of clips are drawn. The
ranks stay those in the whole gallery. The interval has the percentiles 2.5 and 97.5 of the metric
over the draws (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

A draw is a count for each video, and every metric is a function of how often each rank occurs. So
the metrics of all draws come from one matrix product: counts [R, V] by ranks of a video [V, U].
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from drl_jax.evaluation.metrics import METRICS, Ranks, flatten, metrics_of

RESAMPLES = 2000
_PERCENTILES = (2.5, 97.5)


class Difference(NamedTuple):
    """A metric of two models on the same queries."""

    one: float
    other: float
    low: float  # of the 95 % interval of `other - one`; `high` is its upper bound
    high: float
    p_value: float  # two-sided, of the hypothesis that both models are equally good

    @property
    def is_more_than_luck(self) -> bool:
        """Whether the 95 % interval of the difference leaves out 0."""
        return self.low > 0 or self.high < 0


def intervals(ranks: Ranks, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """95 % intervals: as `metrics.metrics_of`, with [lower, upper] in place of each value."""

    def bounds(drawn: Any) -> Any:
        if isinstance(drawn, dict):
            return {name: bounds(values) for name, values in drawn.items()}
        return np.percentile(drawn, _PERCENTILES).tolist()

    return bounds(_drawn_metrics(ranks, resamples, seed))


def differences(
    one: Ranks, other: Ranks, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """Compares two models on the same queries in the same order, by draws of the same videos.

    The differences have the names of `metrics.flatten`.
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


def format_differences(found: Mapping[str, Difference], one: str, other: str) -> str:
    """The table of `differences` of two models."""
    name = f"{other} - {one}"
    lines = [f"{'':<14}{one:>8}{other:>10}{name:>{len(name) + 2}}{'95 % interval':>19}{'p':>8}"]
    for metric, values in found.items():
        bounds = f"[{values.low:+.1f}, {values.high:+.1f}]"
        mark = " *" if values.is_more_than_luck else ""
        change = f"{values.other - values.one:+{len(name) + 2}.1f}"
        lines.append(
            f"{metric:<14}{values.one:8.1f}{values.other:10.1f}{change}{bounds:>19}"
            f"{values.p_value:8.3f}{mark}"
        )
    if any(values.is_more_than_luck for values in found.values()):
        lines.append("* the interval leaves out 0; of 20 metrics of equal models, one may do so")
    return "\n".join(lines)


def _drawn_metrics(ranks: Ranks, resamples: int, seed: int) -> dict[str, Any]:
    """As `metrics.metrics_of`, with the values of all draws, float64 [R], for each value."""
    # They depend on the seed and the number of videos alone, so those of two models are paired.
    rng = np.random.default_rng(seed)
    videos = len(ranks.v2t)
    draws = _draw(rng, videos, resamples)
    drawn: dict[str, Any] = {}
    for direction, cluster in (("t2v", ranks.text_to_video), ("v2t", np.arange(videos))):
        distinct, counts = _counts_of_draws(draws, getattr(ranks, direction), cluster)
        drawn[direction] = {name: metric.of(distinct, counts) for name, metric in METRICS.items()}
    if len(ranks.pair):
        pairs = _draw(rng, int(ranks.pair.max()) + 1, resamples)
        values, counts = _counts_of_draws(pairs, ranks.pair_scores, ranks.pair)
        drawn["pair_accuracy"] = 100 * (counts @ values) / counts.sum(axis=1)
    return drawn


def _draw(rng: np.random.Generator, size: int, resamples: int) -> np.ndarray:
    """How often each of N elements is in each of R draws of N with replacement, float32 [R, N]."""
    drawn = rng.integers(size, size=(resamples, size)) + size * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * size)
    return counts.reshape(resamples, size).astype(np.float32)


def _counts_of_draws(
    draws: np.ndarray, values: np.ndarray, cluster: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draws of V clusters [R, V], and the cluster of each of N values -> the distinct values,
    ascending, [U], and how often each is in each draw, float64 [R, U]."""
    distinct, index = np.unique(values, return_inverse=True)
    members = np.zeros((draws.shape[1], len(distinct)), np.float32)
    np.add.at(members, (cluster, index), 1)
    return distinct, (draws @ members).astype(np.float64)
