"""Comparison of queries with windows: exactly, by a scan, and by Qdrant.

No server runs here: its client's imitation of one does.
"""

import dataclasses
import itertools
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from qdrant_client import QdrantClient
from support.search import made_up_videos, made_up_windows, random_model, write_index

from drl_jax.models.interactions.token_wise import TokenWise
from drl_jax.runtime.errors import Notice, UserError
from drl_jax.runtime.sharding import make_layout
from drl_jax.search import engine as engine_module
from drl_jax.search import qdrant, ranking
from drl_jax.search.commands import measure_recall
from drl_jax.search.encoding import Correction, quantize
from drl_jax.search.engine import Gallery, Part, SearchEngine
from drl_jax.search.filters import Filters
from drl_jax.search.index_file import IndexWriter, join
from drl_jax.search.open_index import stored_windows
from drl_jax.search.qdrant import Qdrant
from drl_jax.search.query import Query
from drl_jax.search.ranking import SearchOptions
from drl_jax.search.session import Index

pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact")

QUERIES = ["a red circle moves to the left", "a green cross grows", "two words"]
CORRECTION, WINDOWS = Correction("is:20"), 31


def videos_of(model, count: int, seed: int = 0):
    """Videos of one window, and a last one of two, with biases of a correction."""
    paths = [f"{number:02}.mp4" for number in range(count)]
    *videos, last = made_up_videos(model, paths, made_up_windows(model, count, seed))
    two = {name: np.repeat(a, 2, axis=0) for name, a in last.arrays.items() if "window." in name}
    biases = np.random.default_rng(seed).random((count, 1, 1), np.float32)
    videos.append(last._replace(arrays={**last.arrays, **two}))
    found = []
    for video, bias in zip(videos, biases, strict=True):
        numbers = np.repeat(bias, len(video.arrays["window.span"]), axis=0)
        arrays = {**video.arrays, "window.hubness": numbers}
        found.append(video._replace(arrays=arrays, sha256=f"{seed}{video.sha256[1:]}"))
    return found


def write(directory, model, *segments, **about):
    hubness = {"columns": [CORRECTION.column], "sha256": ""}
    return write_index(directory, model, segments, hubness=hubness, **about)


# ---------------------------------------------------------------------- blocks, parts, devices


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
    return search_model.encode_text(QUERIES)


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
    for found, row in zip(rankings, similarity, strict=True):
        row = row if valid is None else np.where(valid, row, -np.inf)
        order = np.lexsort((np.arange(len(row)), -row))
        count = np.isfinite(row).sum()
        best = order[: min(top, count)]
        # All with the score of the last one are added.
        ties = [slot for slot in order[len(best) : count] if row[slot] == row[best[-1]]]
        np.testing.assert_array_equal(found.slots, [*best, *ties])
        np.testing.assert_allclose(found.scores, row[found.slots], atol=1e-5)


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
    (best,) = engine.search([Part(sentence), Part(frames, -0.5)], gallery, 50)
    expected = similarity[0] - 0.5 * of_frames
    np.testing.assert_allclose(best.scores, expected[best.slots], atol=1e-5)
    # Of several texts, the most similar counts.
    (best,) = engine.search([Part(text, 2.0)], gallery, 50)
    expected = 2 * similarity.max(axis=0)
    np.testing.assert_allclose(best.scores, expected[best.slots], atol=1e-5)


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


# ---------------------------------------------------------------------- candidates


@pytest.fixture(scope="module")
def exact(search_model, tmp_path_factory):
    """An exact index of these videos; not to be changed."""
    videos = videos_of(search_model, WINDOWS - 1)
    directory = tmp_path_factory.mktemp("engines") / "index"
    write(directory, search_model, videos[:20], videos[20:])
    return Index(directory, search_model, SearchOptions(engine="exact"))


def memory(correction: Correction | None = None) -> Qdrant:
    return Qdrant("memory", correction, QdrantClient(":memory:"))


@pytest.fixture(scope="module")
def server(exact):
    """A server with the collection of the index."""
    engine = memory()
    assert engine.export(exact.state()) == (WINDOWS, 0, 0)
    return engine


def asking(exact: Index, engine, candidates: int, correction=None) -> Index:
    options = SearchOptions("qdrant", candidates, correction=correction)
    return Index(exact.directory, exact.model, options, engine)


def check_same(found: list, expected: list) -> None:
    """Compares paths and scores; batches of other sizes round differently."""
    for hits, others in zip(found, expected, strict=True):
        assert [hit.path for hit in hits] == [hit.path for hit in others]
        scores = [hit.score for hit in others]
        np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-6)


def products_of(index: Index) -> np.ndarray:
    gallery, interaction = index.state().gallery, index.model.interaction
    stored = gallery.take(np.arange(len(gallery)))
    vectors = stored["pooled_unit"] * stored["pooled_unit.scale"][:, None]
    return interaction.query_vectors(index.model.encode_text(QUERIES)) @ vectors.T


def test_a_large_index_is_scanned_and_says_so(exact, monkeypatch):
    monkeypatch.setattr(ranking, "SCAN_FROM", 3)
    with pytest.warns(Notice, match="31 windows are scanned, and the best 500 are compared exac"):
        index = Index(exact.directory, exact.model)
    scan = mock.patch.object(SearchEngine, "scan", autospec=True, side_effect=SearchEngine.scan)
    with scan as scanned:
        check_same([index.search(QUERIES[0])], [exact.search(QUERIES[0])])
    scanned.assert_called_once()


def test_candidates_have_the_largest_products(exact, server):
    """With a correction, which is one channel more, less the biases; in another collection."""
    state, corrected, found = exact.state(), memory(CORRECTION), []
    corrected.export(state)
    assert corrected.collection(state) != server.collection(state)
    queries = exact.model.interaction.query_vectors(exact.model.encode_text(QUERIES))
    products = products_of(exact)
    for engine, values in ((server, products), (corrected, products - state.biases(CORRECTION))):
        found.append([set(slots) for slots in engine(state, queries, 5)])
        assert found[-1] == [set(row) for row in np.argsort(-values, axis=1)[:, :5]]
    assert found[0] != found[1]
    options = dataclasses.replace(exact.ranker.options, correction=CORRECTION)
    expected = Index(exact.directory, exact.model, options).search(QUERIES, 4)
    check_same(asking(exact, corrected, 100, CORRECTION).search(QUERIES, 4), expected)


def test_candidates_are_compared_exactly(exact, server):
    expected = exact.search(QUERIES, 30)
    check_same(asking(exact, server, 100).search(QUERIES, 30), expected)
    for found, all_ in zip(asking(exact, server, 6).search(QUERIES, 3), expected, strict=True):
        score_of = {hit.path: hit.score for hit in all_}
        assert len(found) == 3
        for hit in found:
            assert hit.score == pytest.approx(score_of[hit.path], abs=1e-6)


def test_only_plain_sentences_are_asked(exact, server):
    engine = mock.Mock(side_effect=server)
    index = asking(exact, engine, 200)
    index.search(QUERIES[0], 2)
    index.search(Query(sentence=QUERIES[0], without=QUERIES[1]), 2)
    index.search(QUERIES[0], 2, filters=Filters(only=("03.mp4",)))
    engine.assert_called_once()
    assert engine.call_args.args[2] == 200


def test_export_sends_changes(search_model, tmp_path, capsys):
    """One server is asked while the index changes."""
    first, second, third, *rest = videos_of(search_model, 10)
    write(tmp_path, search_model, [first, second, third, *rest])
    engine = memory()
    index = Index(tmp_path, search_model, SearchOptions("qdrant", 100), engine)

    def found() -> set[str]:
        return {hit.video.path for hits in index.search(QUERIES, 20) for hit in hits}

    assert engine.export(index.state()) == (11, 0, 0)
    assert engine.export(index.state()) == (0, 0, 11)
    changed = videos_of(search_model, 10, seed=1)
    with IndexWriter(tmp_path) as writer:
        writer.put([changed[1], changed[0]._replace(path="new.mp4")], gone=[third.path])
    # Points of another content, or of a file that is gone, are not shown.
    assert found() == {first.path, *(video.path for video in rest)}
    assert capsys.readouterr().err.count("has windows that the index does not have") == 1
    engine.check(index.state())  # As many windows.
    assert engine.export(index.state()) == (2, 2, 9)
    assert found() == {first.path, second.path, "new.mp4", *(video.path for video in rest)}
    assert not capsys.readouterr().err.count("has windows")
    with IndexWriter(tmp_path) as writer:
        writer.put([], gone=["new.mp4"])
    engine.check(index.state())
    line = "has 11 windows, and the index 10; make or update it with"
    assert line in capsys.readouterr().err
    with IndexWriter(tmp_path) as writer:  # Nothing of it is left.
        writer.put([changed[3]], gone=[video.path for video in (first, second, *rest)])
    with pytest.raises(UserError, match=r"no candidate of drl_jax_\w+ is in the index; .* export"):
        found()


def test_an_interrupted_export_continues(exact, monkeypatch):
    monkeypatch.setattr(qdrant, "_WRITTEN", 5)
    monkeypatch.setattr(qdrant, "_READ", 3)
    engine, state = memory(), exact.state()
    upsert = engine._client.upsert
    with monkeypatch.context() as patch:
        interrupted = mock.Mock(side_effect=[mock.DEFAULT, KeyboardInterrupt], wraps=upsert)
        patch.setattr(engine._client, "upsert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.export(state)
    assert engine.export(state) == (WINDOWS - 5, 0, 5)
    assert engine.export(state) == (0, 0, WINDOWS)


def test_joined_indexes(search_model, tmp_path):
    """Paths begin with the folders of the parts."""
    for seed, name in enumerate(("one", "two")):
        write(tmp_path / name, search_model, videos_of(search_model, 10, seed))
    join(tmp_path / "joined", [tmp_path / "one", tmp_path / "two"])
    engine = memory()
    expected = Index(tmp_path / "joined", search_model, SearchOptions("exact"))
    assert engine.export(expected.state())[0] == 22
    check_same(asking(expected, engine, 100).search(QUERIES, 20), expected.search(QUERIES, 20))


@pytest.mark.parametrize("engine", ["scan", "server"])
def test_recall_by_the_number_of_candidates(exact, server, engine):
    index = asking(exact, server, 4) if engine == "server" else exact
    few, all_ = measure_recall(index, QUERIES, [4, WINDOWS], 4)
    assert (few["candidates"], all_["candidates"]) == (4, WINDOWS)
    text = exact.model.encode_text(QUERIES)
    similarity = np.concatenate(
        [exact.model.similarity(text, stored_windows(video)) for video in exact.videos], axis=1
    )
    slots = np.concatenate([video.slots for video in exact.videos])
    shared = sum(
        len(set(slots[np.argsort(-row)[:4]]) & set(np.argsort(-product)[:4]))
        for row, product in zip(similarity, products_of(exact), strict=True)
    )
    assert few.pop("recall") == pytest.approx(shared / 12)
    assert all_["recall"] == 1
    assert min(few.values()) > 0


def test_mistakes_are_one_line(exact, search_model, shapes_config, tmp_path, monkeypatch):
    state = exact.state()
    with pytest.raises(UserError, match=r"no collection drl_jax_\w+ at memory; .*search export"):
        memory().check(state)
    away = Qdrant("http://127.0.0.1:9")
    for call in (away.check, away.export, lambda state: away(state, np.zeros((1, 32)), 3)):
        with pytest.raises(UserError, match=r"^Qdrant at http://127.0.0.1:9: .*refused$"):
            call(state)
    without = random_model(shapes_config, "xti")
    write(tmp_path, without, videos_of(search_model, 2))
    with pytest.raises(UserError, match=r"xti has no vectors .* use engine=exact"):
        Index(tmp_path, without, SearchOptions("qdrant"), memory())
    with pytest.raises(UserError, match="xti has no vectors that Qdrant can compare"):
        memory().export(Index(tmp_path, without).state())
    with pytest.raises(UserError, match="needs the URL of a server: --url"):
        Qdrant("")
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'drl_jax\[qdrant\]'"):
        Qdrant("http://127.0.0.1:9")
