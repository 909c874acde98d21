"""Comparison of queries with windows: blocks, parts, devices, filters, ties, the scan."""

import itertools

import jax
import numpy as np
import pytest

from drl_jax.models.interactions.token_wise import TokenWise
from drl_jax.runtime.sharding import make_layout
from drl_jax.search import engine as engine_module
from drl_jax.search.encoding import quantize
from drl_jax.search.engine import Gallery, Part, SearchEngine

SENTENCES = ["one", "two words", "three more words"]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(engine_module, "BLOCKS", (32, 16))


@pytest.fixture(scope="module")
def video():
    """50 windows of 1 to 4 frames; numbers 7 and 40 are alike."""
    rng = np.random.default_rng(0)
    mask = np.arange(4) < rng.integers(1, 5, (50, 1))
    video = {
        "frame_unit": rng.normal(size=(50, 4, 32)).astype(np.float32),
        "frame_mask": mask,
        "frame_weight": (mask / mask.sum(1, keepdims=True)).astype(np.float32),
    }
    for array in video.values():
        array[40] = array[7]
    return video


@pytest.fixture(scope="module")
def text(search_model):
    return search_model.encode_text(SENTENCES)


@pytest.fixture(scope="module")
def similarity(search_model, text, video):
    return search_model.similarity(text, video)


def engine_of(model, layout):
    return SearchEngine(model.config.model, jax.device_put(model.params, layout.replicated))


def split(arrays, ends):
    return [
        {name: array[start:end] for name, array in arrays.items()}
        for start, end in itertools.pairwise([0, *ends])
    ]


def check(rankings, similarity, top, valid=None):
    """Compares rankings with a matrix whose best rows are expected, by score and slot."""
    for ranking, row in zip(rankings, similarity, strict=True):
        row = row if valid is None else np.where(valid, row, -np.inf)
        order = np.lexsort((np.arange(len(row)), -row))
        count = np.isfinite(row).sum()
        best = order[: min(top, count)]
        # All with the score of the last one are added.
        ties = [slot for slot in order[len(best) : count] if row[slot] == row[best[-1]]]
        np.testing.assert_array_equal(ranking.slots, [*best, *ties])
        np.testing.assert_allclose(ranking.scores, row[ranking.slots], atol=1e-5)


@pytest.mark.parametrize(("devices", "ends"), [(8, [50]), (8, [5, 5, 23, 50]), (1, [40, 44, 50])])
def test_parts_blocks_and_devices_change_nothing(
    small_blocks, search_model, text, video, similarity, devices, ends
):
    """Parts that are blocks of their own, of which the last overlaps, and parts that are copied."""
    parts, layout = split(video, ends), make_layout(jax.devices()[:devices])
    gallery, engine = Gallery(parts, layout), engine_of(search_model, layout)
    for top in (3, 10, 100):
        check(engine.search([Part(text)], gallery, top, is_one=False), similarity, top)
    rng = np.random.default_rng(1)
    biases = rng.normal(size=50).astype(np.float32)
    corrected = engine.search([Part(text)], gallery.only(gallery.valid, biases), 10, is_one=False)
    check(corrected, similarity - biases, 10)
    valid = rng.random(50) < 0.5
    some = gallery.only(valid)
    check(engine.search([Part(text)], some, 10, is_one=False), similarity, 10, valid)
    slots = np.array([3, 7, 8, 21, 40, 49])
    copied = engine.search([Part(text)], gallery.copied(slots), 4, is_one=False)
    check(copied, similarity, 4, np.isin(np.arange(50), slots))
    assert engine.search([Part(text)], gallery.only(np.zeros(50, bool)), 3)[0].slots.size == 0


def test_a_score_is_the_sum_of_its_parts(search_model, text, video, similarity):
    """Parts of 24 and 4 tokens are compared as each is alone: padding takes part in maxima."""
    layout = search_model.layout
    gallery, engine = Gallery([video], layout), engine_of(search_model, layout)
    frames = TokenWise.video_as_text({name: array[:1] for name, array in video.items()})
    of_frames = search_model.similarity(frames, video)[0]
    sentence = {name: array[:1] for name, array in text.items()}
    (ranking,) = engine.search([Part(sentence), Part(frames, -0.5)], gallery, 50)
    expected = similarity[0] - 0.5 * of_frames
    np.testing.assert_allclose(ranking.scores, expected[ranking.slots], atol=1e-5)
    # Of several texts, the most similar counts.
    (ranking,) = engine.search([Part(text, 2.0)], gallery, 50)
    expected = 2 * similarity.max(axis=0)
    np.testing.assert_allclose(ranking.scores, expected[ranking.slots], atol=1e-5)


def test_a_scan_finds_the_largest_dot_products(small_blocks, search_model, text, video):
    vectors = TokenWise.video_vectors(video)
    stored = {**video, **quantize({"pooled_unit": vectors}, "int8")}
    parts, layout = split(stored, [5, 5, 23, 50]), search_model.layout
    gallery, engine = Gallery(parts, layout), engine_of(search_model, layout)
    queries = TokenWise.query_vectors(text)
    rounded = stored["pooled_unit"].astype(np.float32) * stored["pooled_unit.scale"][:, None]
    products = queries @ rounded.T
    valid = np.random.default_rng(2).random(50) < 0.7
    for chosen, gallery_of in ((np.ones(50, bool), gallery), (valid, gallery.only(valid))):
        for rows in ([0], [0, 1, 2]):
            found = engine.scan(queries[rows], gallery_of, 8)
            for slots, row in zip(found, products[rows], strict=True):
                best = np.argsort(-np.where(chosen, row, -np.inf))[:8]
                np.testing.assert_array_equal(slots, np.sort(best))
    assert len(engine.scan(queries, gallery, 100)[0]) == 50
