import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from drl_jax.evaluation import metrics
from drl_jax.evaluation.bootstrap import intervals
from drl_jax.evaluation.legacy import legacy_metrics


def retrieval_metrics(sim_matrix, text_to_video):
    return metrics.metrics_of(metrics.query_ranks(sim_matrix, text_to_video))


@st.composite
def split(draw):
    """Similarities, with many ties or none, and the video of each caption."""
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


@given(split())
@settings(max_examples=150, deadline=None)
def test_ranks_are_those_of_scipy(split):
    sim_matrix, text_to_video = split
    ranks = metrics.query_ranks(sim_matrix, text_to_video)
    t2v = rankdata(-sim_matrix, method="average", axis=1)
    np.testing.assert_array_equal(ranks.t2v, t2v[np.arange(len(t2v)), text_to_video])
    v2t = rankdata(-sets_of(sim_matrix, text_to_video), method="average", axis=1)
    np.testing.assert_array_equal(ranks.v2t, np.diag(v2t))
    found = metrics.metrics_of(ranks)
    assert found["t2v"]["R@5"] == pytest.approx(100 * np.mean(ranks.t2v <= 5))
    assert found["v2t"]["MdR"] == np.median(np.diag(v2t))


@given(split())
@settings(max_examples=150, deadline=None)
def test_legacy_ranks_are_all_places_of_an_equal_score(split):
    """The published formula: where the sorted row equals the score of the correct candidate."""
    sim_matrix, text_to_video = split
    sets = sets_of(sim_matrix, text_to_video)
    found = legacy_metrics(sim_matrix, text_to_video)
    square = [("v2t", sets, np.arange(len(sets)))]
    if len(sim_matrix) == len(sets):
        square.append(("t2v", sim_matrix, text_to_video))
    else:
        # Candidates in a stable order, one rank a query, and the lower of two middle ranks.
        places = np.argsort(np.argsort(-sim_matrix, axis=1, kind="stable"), axis=1)
        ranks = 1 + places[np.arange(len(places)), text_to_video]
        assert found["t2v"]["ranks"] == found["t2v"]["queries"] == len(ranks)
        assert found["t2v"]["MnR"] == pytest.approx(ranks.mean())
        assert found["t2v"]["MdR"] == np.percentile(ranks, 50, method="lower")
    for direction, scores, correct in square:
        own = scores[np.arange(len(scores)), correct]
        ranks = 1 + np.where(np.sort(-scores, axis=1) + own[:, None] == 0)[1]
        assert found[direction]["ranks"] == len(ranks)
        assert found[direction]["R@1"] == pytest.approx(100 * np.mean(ranks <= 1))
        assert found[direction]["R@10"] == pytest.approx(100 * np.mean(ranks <= 10))
        assert found[direction]["MdR"] == np.median(ranks)
        assert found[direction]["MnR"] == pytest.approx(ranks.mean())


def test_legacy_has_1012_ranks_for_the_captions_of_msrvtt():
    """Of the 1,000 test captions of 1k-A, three occur twice and one three times."""
    captions = np.arange(1000)
    captions[[1, 3, 5, 7, 8]] = [0, 2, 4, 6, 6]
    features = np.random.default_rng(0).normal(size=(1000, 32))
    similarity_of_captions = features @ np.random.default_rng(1).normal(size=(32, 1000))
    found = legacy_metrics(similarity_of_captions[captions], np.arange(1000))
    assert (found["t2v"]["queries"], found["t2v"]["ranks"]) == (1000, 1000)
    assert (found["v2t"]["queries"], found["v2t"]["ranks"]) == (1000, 1012)


def test_legacy_equals_the_default_without_ties():
    sim_matrix = np.random.default_rng(0).normal(size=(50, 50))
    found = legacy_metrics(sim_matrix, np.arange(50))
    expected = retrieval_metrics(sim_matrix, np.arange(50))
    for direction in metrics.DIRECTIONS:
        assert found[direction] == expected[direction] | {"queries": 50, "ranks": 50}


def test_hand_computed_ranks():
    sim_matrix = np.array([[0.9, 0.1, 0.5], [0.8, 0.2, 0.3], [0.1, 0.2, 0.3]])
    found = retrieval_metrics(sim_matrix, np.arange(3))
    # Texts: ranks 1, 3, 1. Videos: 1, 1 (level with another: 1.5), 2 (level with another: 2.5).
    assert found["t2v"]["R@1"] == pytest.approx(200 / 3)
    assert found["t2v"]["R@5"] == 100
    assert found["t2v"]["MdR"] == 1
    assert found["t2v"]["MnR"] == pytest.approx(5 / 3)
    assert found["v2t"]["R@1"] == pytest.approx(100 / 3)
    assert found["v2t"]["MnR"] == pytest.approx((1 + 1.5 + 2.5) / 3)


def test_a_constant_model_gets_chance():
    found = retrieval_metrics(np.zeros((100, 100)), np.arange(100))
    assert found["t2v"]["R@1"] == 0
    assert found["t2v"]["MnR"] == found["v2t"]["MnR"] == 50.5


def test_several_captions_of_a_video():
    text_to_video = np.array([0, 0, 1])
    sim_matrix = np.array([[0.1, 0.2], [0.9, 0.3], [0.8, 0.4]])
    found = retrieval_metrics(sim_matrix, text_to_video)
    # Each caption ranks on its own (2, 1, 2); a video looks for its set of captions.
    assert found["t2v"]["MnR"] == pytest.approx(5 / 3)
    assert found["v2t"]["R@1"] == 100


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
        retrieval_metrics(sim_matrix, np.array(caption_to_video))


def test_pair_accuracy_counts_ties_as_half():
    def pair_accuracy(sim_matrix):
        ranks = metrics.query_ranks(sim_matrix, np.arange(2), np.array([[0, 1]]))
        return metrics.metrics_of(ranks)["pair_accuracy"]

    sim_matrix = np.array([[0.5, 0.4], [0.6, 0.3]])
    assert pair_accuracy(sim_matrix) == 50
    assert pair_accuracy(sim_matrix.T) == 0
    assert pair_accuracy(np.eye(2)) == 100
    assert pair_accuracy(np.array([[0.5, 0.5 + 1e-7], [0.5 + 1e-7, 0.5]])) == 50


def test_pair_accuracy_is_that_of_the_texts_of_pairs():
    """Texts of videos without a reverse do not count."""
    rng = np.random.default_rng(0)
    sim_matrix = rng.normal(size=(40, 12))
    text_to_video = np.concatenate([np.arange(12), rng.integers(12, size=28)])
    pairs = np.array([[3, 7], [11, 0]])
    reverse = {3: 7, 7: 3, 11: 0, 0: 11}
    expected = [
        row[own] > row[reverse[own]]
        for row, own in zip(sim_matrix, text_to_video, strict=True)
        if own in reverse
    ]
    ranks = metrics.query_ranks(sim_matrix, text_to_video, pairs)
    assert metrics.metrics_of(ranks)["pair_accuracy"] == pytest.approx(100 * np.mean(expected))
    assert set(ranks.pair) == {0, 1}


def test_the_table_shows_every_number():
    table = metrics.format_table(retrieval_metrics(np.eye(3), np.arange(3)))
    assert table.splitlines()[1].split() == ["t2v", "100.0", "100.0", "100.0", "1.0", "1.0"]
    assert table.splitlines()[2].split()[0] == "v2t"


def test_the_table_shows_intervals_beside_their_numbers():
    ranks = metrics.query_ranks(np.eye(4), np.arange(4), np.array([[0, 1]]))
    lines = metrics.format_table(metrics.metrics_of(ranks), intervals(ranks)).splitlines()
    assert lines[1].count("100.0 [100.0, 100.0]") == 3
    assert lines[1].endswith("1.0 [1.0, 1.0]")
    assert lines[3] == "pair accuracy 100.0 [100.0, 100.0] (chance 50)"
    assert len({len(line) for line in lines[:3]}) == 1
