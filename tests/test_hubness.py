"""Corrections for hubs against the published formulas, and on a gallery with hubs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drl_jax.evaluation import hubness
from drl_jax.evaluation.metrics import expected_ranks
from drl_jax.evaluation.post_processing import (
    METHODS,
    Method,
    Similarities,
    describe,
    fit,
    post_processed,
)

BANKED = {
    "is": lambda scores, bank: hubness.inverted_softmax(scores, bank, 20),
    "qbnorm": lambda scores, bank: hubness.dynamic_inverted_softmax(scores, bank, 20, 1),
    "nnn": lambda scores, bank: hubness.nnn(scores, bank, 128, 0.75),
}


@st.composite
def scores_and_bank(draw):
    """Similarities of queries and of a bank, with many ties or none."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, others, candidates = (draw(st.integers(1, 8)) for _ in range(3))
    levels = draw(st.integers(0, 4))

    def similarities(rows):
        shape = (rows, candidates)
        return rng.integers(levels, size=shape) / 4 if levels else rng.uniform(-1, 1, shape)

    return similarities(queries), similarities(others)


def inverted_softmax(scores, bank, beta):
    """exp(beta S[q, v]) / sum_b exp(beta S[b, v]), as published."""
    return np.exp(beta * scores) / np.exp(beta * bank).sum(axis=0)


@given(scores_and_bank(), st.sampled_from([1, 20]), st.integers(1, 10), st.sampled_from([0.5, 1]))
@settings(max_examples=100, deadline=None)
def test_corrections_are_the_published_ones(given_scores, beta, k, w):
    scores, bank = given_scores
    found = np.exp(beta * hubness.inverted_softmax(scores, bank, beta))
    np.testing.assert_allclose(found, len(bank) * inverted_softmax(scores, bank, beta), rtol=1e-9)
    largest = np.sort(bank, axis=0)[::-1][:k].mean(axis=0)
    np.testing.assert_allclose(hubness.nnn(scores, bank, k, w), scores - w * largest, atol=1e-12)
    # S * softmax(beta S) over the queries, times their number (CAMoE's code).
    shares = np.exp(100 * scores) / np.exp(100 * scores).sum(axis=0)
    expected = scores * shares * len(scores)
    np.testing.assert_allclose(hubness.dual_softmax(scores, 100), expected, atol=1e-12)


@given(scores_and_bank(), st.sampled_from([1, 2]))
@settings(max_examples=100, deadline=None)
def test_qb_norm_corrects_the_queries_that_find_an_active_candidate(given_scores, k):
    scores, bank = given_scores
    found = hubness.dynamic_inverted_softmax(scores, bank, 20, k)
    corrected = hubness.inverted_softmax(scores, bank, 20)
    for row in range(len(scores)):
        active = {
            candidate
            for other in bank
            for candidate in range(len(other))
            if (other > other[candidate]).sum() < k
        }
        best = {c for c in range(scores.shape[1]) if scores[row, c] == scores[row].max()}
        expected = corrected[row] if best & active else scores[row]
        np.testing.assert_array_equal(found[row], expected)


@pytest.mark.parametrize("name", BANKED)
def test_scores_without_a_bank_large_ones_and_equal_ones(name):
    rng, apply = np.random.default_rng(0), BANKED[name]
    for dtype in (np.float32, np.float64):
        scores = rng.normal(size=(7, 5)).astype(dtype)
        scores[0] = [-0.0, 0.0, 0.0, 1.0, 1.0]
        found = apply(scores, np.zeros((0, 5), dtype))
        assert (found.dtype, found.tobytes()) == (dtype, scores.tobytes())
    scores, bank = (1000 * rng.normal(size=shape).astype(np.float32) for shape in ((6, 4), (9, 4)))
    before = scores.tobytes(), bank.tobytes()
    assert np.isfinite(apply(scores, bank)).all()
    assert np.isfinite(hubness.dual_softmax(scores, 100)).all()
    assert (scores.tobytes(), bank.tobytes()) == before
    scores, bank = (np.repeat(rng.normal(size=(n, 3)), 2, axis=1) for n in (5, 200))
    found = apply(scores, bank)
    np.testing.assert_array_equal(found[:, ::2], found[:, 1::2])


@pytest.fixture(scope="module")
def gallery():
    """1,000 videos, of which 5 % are pushed towards the mean of all texts; a bank of 5,000 texts.

    Returns:
      Similarities of the texts of the videos [V, V], and of other texts [N, V].
    """
    rng = np.random.default_rng(0)
    videos, others, channels = 1000, 5000, 64
    mean = rng.normal(size=channels)

    def unit(vectors):
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    video = rng.normal(size=(videos, channels))
    text = video + 2.3 * rng.normal(size=video.shape) + 1.5 * mean
    # As long as texts of videos of their own.
    bank = np.hypot(1, 2.3) * rng.normal(size=(others, channels)) + 1.5 * mean
    video[: videos // 20] += mean
    return unit(text) @ unit(video).T, unit(bank) @ unit(video).T


def recall(scores):
    return 100 * (expected_ranks(scores, np.arange(len(scores))) <= 1).mean()


def test_a_gallery_with_hubs_is_corrected(gallery):
    scores, bank = gallery
    most = np.bincount(scores.argmax(axis=1)).max()
    assert most > 20  # A hub is the first hit of many texts.
    assert recall(scores) == pytest.approx(12, abs=2)
    for name in BANKED:
        corrected = BANKED[name](scores, bank)
        assert recall(corrected) == pytest.approx(50, abs=3), name
        assert np.bincount(corrected.argmax(axis=1)).max() < most / 3
    assert recall(hubness.dual_softmax(scores, 100)) == pytest.approx(51, abs=3)
    # The published quotient ranks as the difference does.
    quotient, correct = inverted_softmax(scores, bank, 20), np.arange(len(scores))
    ranks = expected_ranks(BANKED["is"](scores, bank), correct)
    np.testing.assert_array_equal(expected_ranks(quotient, correct), ranks)


def test_parameters_are_those_that_are_best_on_a_split(gallery):
    scores, bank = gallery
    captions = np.arange(len(scores))
    similarities = Similarities(
        scores, bank, np.zeros((len(scores), 0)), captions, np.zeros((0, 2), int)
    )
    grid = ({"beta": 70}, {"beta": 20}, {"beta": 20.0})
    method = Method("IS", grid, METHODS["is"].apply)
    fitted = fit(method, similarities)
    assert fitted["t2v"] is grid[1]  # Of equal ones, the first.
    assert fitted["v2t"] is grid[0]  # Without a bank of videos, all are equal.
    t2v, v2t = (post_processed(method, similarities, d, fitted[d]) for d in ("t2v", "v2t"))
    assert recall(t2v) > recall(hubness.inverted_softmax(scores, bank, 70))
    np.testing.assert_array_equal(v2t, scores)
    expected = "IS t2v beta=20, v2t beta=70, fitted on val; bank of 9 captions"
    assert describe(method, fitted, "9 captions") == expected


def test_a_bank_of_videos_corrects_captions(gallery):
    """v2t is t2v of the transposed similarities."""
    scores, bank = gallery
    similarities = Similarities(
        scores.T, np.zeros((0, len(scores))), bank.T, np.arange(len(scores)), np.zeros((0, 2), int)
    )
    for name, apply in BANKED.items():
        found = post_processed(METHODS[name], similarities, "v2t", METHODS[name].grid[0])
        np.testing.assert_array_equal(found, apply(scores, bank).T)
