import numpy as np
import pytest

from drl_jax.evaluation import metrics


def test_hand_computed_ranks():
    sim_matrix = np.array([[0.9, 0.1, 0.5], [0.8, 0.2, 0.3], [0.1, 0.2, 0.3]])
    found = metrics.retrieval_metrics(sim_matrix, np.arange(3))
    # Texts: ranks 1, 3, 1. Videos: 1, 1 (level with another: 1.5), 2 (level with another: 2.5).
    assert found["t2v"]["R@1"] == pytest.approx(200 / 3)
    assert found["t2v"]["R@5"] == 100
    assert found["t2v"]["MdR"] == 1
    assert found["t2v"]["MnR"] == pytest.approx(5 / 3)
    assert found["v2t"]["R@1"] == pytest.approx(100 / 3)
    assert found["v2t"]["MnR"] == pytest.approx((1 + 1.5 + 2.5) / 3)


def test_a_constant_model_gets_chance():
    found = metrics.retrieval_metrics(np.zeros((100, 100)), np.arange(100))
    assert found["t2v"]["R@1"] == 0
    assert found["t2v"]["MnR"] == found["v2t"]["MnR"] == 50.5


def test_several_captions_of_a_video():
    text_to_video = np.array([0, 0, 1])
    sim_matrix = np.array([[0.1, 0.2], [0.9, 0.3], [0.8, 0.4]])
    found = metrics.retrieval_metrics(sim_matrix, text_to_video)
    # Each caption ranks on its own (2, 1, 2); a video looks for its set of captions.
    assert found["t2v"]["MnR"] == pytest.approx(5 / 3)
    assert found["v2t"]["R@1"] == 100


def test_ranks_equal_a_brute_force_search():
    rng = np.random.default_rng(0)
    text_to_video = np.sort(np.concatenate([np.arange(20), rng.integers(0, 20, 30)]))
    sim_matrix = rng.normal(size=(50, 20))
    t2v = [
        1 + sum(s > row[own] for s in row)
        for row, own in zip(sim_matrix, text_to_video, strict=True)
    ]
    v2t = []
    for video in range(20):
        sets = [max(sim_matrix[text_to_video == other, video]) for other in range(20)]
        v2t.append(1 + sum(s > sets[video] for s in sets))
    found = metrics.retrieval_metrics(sim_matrix, text_to_video)
    assert found["t2v"]["MnR"] == pytest.approx(np.mean(t2v))
    assert found["v2t"]["MnR"] == pytest.approx(np.mean(v2t))
    assert found["t2v"]["R@10"] == pytest.approx(np.mean(np.array(t2v) <= 10) * 100)
    assert found["v2t"]["MdR"] == np.median(v2t)


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
        metrics.retrieval_metrics(sim_matrix, np.array(caption_to_video))


def test_pair_accuracy_counts_ties_as_half():
    sim_matrix = np.array([[0.5, 0.4], [0.6, 0.3]])
    pairs = np.array([[0, 1]])
    assert metrics.pair_accuracy(sim_matrix, np.arange(2), pairs) == 50
    assert metrics.pair_accuracy(sim_matrix.T, np.arange(2), pairs) == 0
    assert metrics.pair_accuracy(np.eye(2), np.arange(2), pairs) == 100
    rounding = np.array([[0.5, 0.5 + 1e-7], [0.5 + 1e-7, 0.5]])
    assert metrics.pair_accuracy(rounding, np.arange(2), pairs) == 50


def test_the_table_shows_every_number():
    table = metrics.format_table(metrics.retrieval_metrics(np.eye(3), np.arange(3)))
    assert table.splitlines()[1].split() == ["t2v", "100.0", "100.0", "100.0", "1.0", "1.0"]
    assert table.splitlines()[2].split()[0] == "v2t"
