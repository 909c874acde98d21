import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from drl_jax.evaluation import metrics
from drl_jax.evaluation.bootstrap import intervals
from drl_jax.evaluation.legacy import legacy_metrics


@st.composite
def split(draw):
    """Similarities, with many ties (or only ties) or none, and the video of each caption."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (sum(counts), len(counts))
    levels = draw(st.integers(0, 4))
    sim_matrix = rng.integers(levels, size=shape) / 4 if levels else rng.normal(size=shape)
    text_to_video = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return sim_matrix.astype(draw(st.sampled_from([np.float32, np.float64]))), text_to_video


def sets_of(sim_matrix, text_to_video):
    """Similarity of each video to the captions of each video."""
    videos = range(sim_matrix.shape[1])
    return np.array(
        [[sim_matrix[text_to_video == texts, video].max() for texts in videos] for video in videos]
    )


def summary(ranks):
    recalls = {f"R@{k}": 100 * np.mean(ranks <= k) for k in (1, 5, 10)}
    return pytest.approx({**recalls, "MdR": np.median(ranks), "MnR": ranks.mean()})


@given(split())
@settings(max_examples=100, deadline=None)
def test_metrics_are_those_of_the_mean_ranks_of_scipy(split):
    sim_matrix, text_to_video = split
    ranks = metrics.query_ranks(sim_matrix, text_to_video)
    t2v = rankdata(-sim_matrix, method="average", axis=1)
    np.testing.assert_array_equal(ranks.t2v, t2v[np.arange(len(t2v)), text_to_video])
    v2t = rankdata(-sets_of(sim_matrix, text_to_video), method="average", axis=1)
    np.testing.assert_array_equal(ranks.v2t, np.diag(v2t))
    found = metrics.metrics_of(ranks)
    assert found == {"t2v": summary(ranks.t2v), "v2t": summary(ranks.v2t)}


@given(split())
@settings(max_examples=100, deadline=None)
def test_legacy_ranks_are_all_places_of_an_equal_score(split):
    """The published formula: where the sorted row equals the score of the correct candidate."""
    sim_matrix, text_to_video = split
    sets = sets_of(sim_matrix, text_to_video)
    found = legacy_metrics(sim_matrix, text_to_video)

    def places(scores, correct):
        own = scores[np.arange(len(scores)), correct]
        return 1 + np.where(np.sort(-scores, axis=1) + own[:, None] == 0)[1]

    expected = {"v2t": places(sets, np.arange(len(sets)))}
    if len(sim_matrix) == len(sets):
        expected["t2v"] = places(sim_matrix, text_to_video)
    else:
        # Candidates in a stable order, one rank a query, and the lower of two middle ranks.
        order = np.argsort(np.argsort(-sim_matrix, axis=1, kind="stable"), axis=1)
        expected["t2v"] = 1 + order[np.arange(len(order)), text_to_video]
        lower = np.percentile(expected["t2v"], 50, method="lower")
        assert found["t2v"]["MdR"] == lower
        found["t2v"]["MdR"] = np.median(expected["t2v"])
    queries = {"t2v": len(sim_matrix), "v2t": len(sets)}
    for direction, ranks in expected.items():
        assert found[direction].pop("queries") == queries[direction]
        assert found[direction].pop("ranks") == len(ranks)
        assert found[direction] == summary(ranks)


@pytest.mark.parametrize(
    ("sim_matrix", "caption_to_video", "message"),
    [
        (np.zeros((2, 2)), [0, 0], "every column"),
        (np.zeros((2, 2)), [0, 1, 1], "2 rows"),
        (np.full((2, 2), np.nan), [0, 1], "not finite"),
    ],
)
def test_invalid_inputs_are_refused(sim_matrix, caption_to_video, message):
    with pytest.raises(ValueError, match=message):
        metrics.query_ranks(sim_matrix, np.array(caption_to_video))


def test_pair_accuracy_is_that_of_the_texts_of_pairs():
    """Texts of videos without a reverse do not count, and ties count as half."""
    rng = np.random.default_rng(0)
    sim_matrix = rng.normal(size=(40, 12))
    text_to_video = np.concatenate([np.arange(12), rng.integers(12, size=28)])
    pairs = np.array([[3, 7], [11, 0]])
    reverse = {3: 7, 7: 3, 11: 0, 0: 11}
    sim_matrix[3, 7] = sim_matrix[3, 3] + 1e-7
    expected = [
        0.5 if text == 3 else sim_matrix[text, own] > sim_matrix[text, reverse[own]]
        for text, own in enumerate(text_to_video)
        if own in reverse
    ]
    ranks = metrics.query_ranks(sim_matrix, text_to_video, pairs)
    np.testing.assert_array_equal(ranks.pair_scores, expected)
    assert metrics.metrics_of(ranks)["pair_accuracy"] == pytest.approx(100 * np.mean(expected))
    assert set(ranks.pair) == {0, 1}


def test_the_table_shows_every_number_and_intervals_beside_them():
    ranks = metrics.query_ranks(np.eye(4), np.arange(4), np.array([[0, 1]]))
    found = metrics.metrics_of(ranks)
    names, t2v, v2t, _ = metrics.format_table(found).splitlines()
    shown = dict(zip(names.split(), t2v.split()[1:], strict=True))
    assert shown == {name: f"{found['t2v'][name]:.1f}" for name in metrics.METRICS}
    assert v2t.split() == ["v2t", *shown.values()]
    lines = metrics.format_table(found, intervals(ranks)).splitlines()
    assert "100.0 [100.0, 100.0]" in lines[1]
    assert "  1.0 [1.0, 1.0]" in lines[2]
    assert lines[3] == "pair accuracy 100.0 [100.0, 100.0] (chance 50)"
    assert len({len(line) for line in lines[:3]}) == 1
