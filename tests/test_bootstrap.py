"""Intervals of metrics, and differences of two models, against brute force and simulations."""

import numpy as np

from drl_jax.evaluation.bootstrap import _draw, differences, intervals
from drl_jax.evaluation.metrics import METRICS, Ranks, flatten, metrics_of, query_ranks

NO_PAIRS = (np.zeros(0), np.zeros(0, int))


def gallery(rng, videos, *, captions=1, noise=1.4):
    """Similarities of videos and up to `captions` captions of each, which share their noise."""

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    video = rng.normal(size=(videos, 16))
    topic = video + noise * rng.normal(size=video.shape)
    text_to_video = np.repeat(np.arange(videos), rng.integers(1, captions + 1, size=videos))
    text = topic[text_to_video]
    if captions > 1:
        text = text + noise * rng.normal(size=text.shape)
    return unit(text) @ unit(video).T, text_to_video


def test_intervals_cover_the_truth():
    """Of R@1 in 93 to 97 % of the galleries. The truth is the mean over all galleries.

    With so few videos, percentiles of R@5 and R@10, whose values are close to 100, cover less.
    """
    rng = np.random.default_rng(0)
    ranks = [query_ranks(*gallery(rng, 80, captions=5, noise=1.1)) for _ in range(1000)]
    values = [flatten(metrics_of(gallery_ranks)) for gallery_ranks in ranks]
    covered = {f"{direction} R@{k}": 0 for direction in ("t2v", "v2t") for k in (1, 5, 10)}
    truth = {name: np.mean([value[name] for value in values]) for name in covered}
    assert 40 < truth["t2v R@1"] < 60
    for seed, gallery_ranks in enumerate(ranks[:400]):
        found = flatten(intervals(gallery_ranks, resamples=400, seed=seed))
        for name in covered:
            low, high = found[name]
            covered[name] += low <= truth[name] <= high
    rates = {name: count / 4 for name, count in covered.items()}
    assert 93 <= rates["t2v R@1"] <= 97, rates
    assert 93 <= rates["v2t R@1"] <= 97, rates
    assert min(rates.values()) > 91, rates


def test_intervals_are_percentiles_of_the_metrics_of_drawn_videos():
    """As a loop over the draws computes them, which repeats the captions of each drawn video."""
    rng = np.random.default_rng(1)
    sim_matrix, text_to_video = gallery(rng, 30, captions=4)
    ranks = query_ranks(sim_matrix, text_to_video, np.arange(20).reshape(10, 2))
    found = flatten(intervals(ranks, resamples=300, seed=7))
    assert len(found) == 2 * len(METRICS) + 1  # And pair accuracy.

    rng = np.random.default_rng(7)
    videos, pairs = (_draw(rng, size, 300).astype(int) for size in (30, 10))
    draws = []
    for video_counts, pair_counts in zip(videos, pairs, strict=True):
        assert video_counts.sum() == 30
        drawn = Ranks(
            np.repeat(ranks.t2v, video_counts[text_to_video]),
            np.repeat(ranks.v2t, video_counts),
            np.repeat(text_to_video, video_counts[text_to_video]),
            np.repeat(ranks.pair_scores, pair_counts[ranks.pair]),
            np.repeat(ranks.pair, pair_counts[ranks.pair]),
        )
        draws.append(flatten(metrics_of(drawn)))
    for name, bounds in found.items():
        expected = np.percentile([draw[name] for draw in draws], (2.5, 97.5))
        np.testing.assert_allclose(bounds, expected, rtol=1e-9, err_msg=name)


def test_a_better_model_is_recognised_on_the_same_queries():
    """The difference is certain where the intervals of the two models overlap."""
    rng = np.random.default_rng(4)
    one = np.where(rng.random(400) < 0.5, 1.0, 3.0)
    other = np.where((one > 1) & (rng.random(400) < 0.1), 1.0, one)
    runs = [Ranks(t2v, np.ones(400), np.arange(400), *NO_PAIRS) for t2v in (one, other)]
    (_, high), (low, _) = (intervals(run)["t2v"]["R@1"] for run in runs)
    assert low < high
    found = differences(*runs)
    recall = found["t2v R@1"]
    assert recall.is_more_than_luck
    assert recall.p_value < 0.01
    assert 0 < recall.low < recall.other - recall.one < recall.high
    assert found["v2t R@1"] == (100, 100, 0, 0, 1)
    backwards = differences(*runs[::-1])["t2v R@1"]
    assert (backwards.low, backwards.high) == (-recall.high, -recall.low)


def test_equally_good_models_seldom_differ():
    """In about 5 of 100 galleries."""
    rng = np.random.default_rng(5)
    alarms = []
    for seed in range(200):
        one, other = (np.where(rng.random(100) < 0.5, 1.0, 3.0) for _ in range(2))
        runs = [Ranks(t2v, np.ones(100), np.arange(100), *NO_PAIRS) for t2v in (one, other)]
        found = differences(*runs, resamples=300, seed=seed)["t2v R@1"]
        alarms.append(found.is_more_than_luck)
    assert 2 <= 100 * np.mean(alarms) <= 8
