"""Candidates of a scan and of Qdrant. No server runs here: its client's imitation of one does."""

import dataclasses
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
from qdrant_client import QdrantClient
from support.search import random_model
from support.videos import numbered_frames, write_video

from drl_jax.runtime.errors import Notice, UserError
from drl_jax.search import qdrant, ranking
from drl_jax.search.commands import measure_recall
from drl_jax.search.encoding import Correction
from drl_jax.search.engine import SearchEngine
from drl_jax.search.filters import Filters
from drl_jax.search.index_file import join
from drl_jax.search.open_index import stored_windows
from drl_jax.search.qdrant import Qdrant
from drl_jax.search.query import Query
from drl_jax.search.ranking import SearchOptions
from drl_jax.search.session import Index
from drl_jax.search.update import update_index

pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact")

QUERIES = ["a red circle moves to the left", "a green cross grows", "two words"]
BANK = ("a red circle moves left", "a blue square", "two shapes", "a cross")


@pytest.fixture(scope="module")
def shared_videos(test_videos, tmp_path_factory):
    """Eleven test videos, and a long one; not to be changed."""
    folder = tmp_path_factory.mktemp("engines") / "videos"
    folder.mkdir()
    for path in sorted(test_videos.iterdir())[:11]:
        shutil.copy2(path, folder)
    write_video(folder / "zz_long.mp4", numbered_frames(40, 64, 64), fps=2)
    return folder


@pytest.fixture(scope="module")
def exact(search_model, shared_videos):
    """An exact index of these videos; not to be changed."""
    directory = shared_videos.parent / "index"
    update_index(search_model, shared_videos, directory, storage="float32", bank=BANK)
    return Index(directory, search_model, SearchOptions(engine="exact"))


def test_a_large_index_is_scanned_and_says_so(exact, monkeypatch):
    monkeypatch.setattr(ranking, "SCAN_FROM", 3)
    with pytest.warns(
        Notice, match=r"\d windows are scanned, and the best 500 are compared exactly"
    ):
        index = Index(exact.directory, exact.model)
    with mock.patch.object(
        SearchEngine, "scan", autospec=True, side_effect=SearchEngine.scan
    ) as scan:
        check_same([index.search(QUERIES[0])], [exact.search(QUERIES[0])])
    scan.assert_called_once()


def memory(correction: Correction | None = None) -> Qdrant:
    return Qdrant("memory", correction, QdrantClient(":memory:"))


@pytest.fixture(scope="module")
def server(exact):
    """A server with the collection of the index."""
    engine = memory()
    engine.export(exact.state())
    return engine


def asking(exact: Index, engine: Qdrant, candidates: int, correction=None) -> Index:
    options = SearchOptions("qdrant", candidates, 1, correction)
    return Index(exact.directory, exact.model, options, engine)


def check_same(found: list, expected: list) -> None:
    """Compares paths and scores; batches of other sizes round differently."""
    for hits, others in zip(found, expected, strict=True):
        assert [hit.path for hit in hits] == [hit.path for hit in others]
        scores = [hit.score for hit in others]
        np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-6)


def vectors_of(index: Index) -> np.ndarray:
    gallery = index.state().gallery
    stored = gallery.take(np.arange(len(gallery)))
    return stored["pooled_unit"] * stored["pooled_unit.scale"][:, None]


def test_candidates_have_the_largest_products(exact, server):
    text = exact.model.encode_text(QUERIES)
    queries = exact.model.interaction.query_vectors(text)
    found = server(exact.state(), queries, 5)
    for slots, products in zip(found, queries @ vectors_of(exact).T, strict=True):
        assert set(slots) == set(np.argsort(-products)[:5])


def test_the_correction_is_a_channel(exact):
    """It changes which windows are found, and has a collection of its own."""
    correction, state = Correction("is:20"), exact.state()
    engine = memory(correction)
    engine.export(state)
    assert engine.collection(state) != memory().collection(state)
    queries = exact.model.interaction.query_vectors(exact.model.encode_text(QUERIES))
    products = queries @ vectors_of(exact).T
    corrected = products - state.biases(correction)
    found = [set(slots) for slots in engine(state, queries, 5)]
    assert found == [set(row) for row in np.argsort(-corrected, axis=1)[:, :5]]
    assert found != [set(row) for row in np.argsort(-products, axis=1)[:, :5]]
    index = asking(exact, engine, 100, correction)
    options = dataclasses.replace(exact.ranker.options, correction=correction, refine=1)
    expected = Index(exact.directory, exact.model, options).search(QUERIES, 4)
    check_same(index.search(QUERIES, 4), expected)


def test_candidates_are_compared_exactly(exact, server):
    options = dataclasses.replace(exact.ranker.options, refine=1)
    expected = Index(exact.directory, exact.model, options).search(QUERIES, 12)
    check_same(asking(exact, server, 100).search(QUERIES, 12), expected)
    for found, all_ in zip(asking(exact, server, 6).search(QUERIES, 3), expected, strict=True):
        score_of = {hit.path: hit.score for hit in all_}
        assert len(found) == 3
        for hit in found:
            assert hit.score == pytest.approx(score_of[hit.path], abs=1e-6)


def test_only_plain_sentences_are_asked(exact, server):
    asked = []

    def ask(state, vectors, count):
        asked.append(count)
        return server(state, vectors, count)

    index = Index(exact.directory, exact.model, SearchOptions("qdrant", 9, 1), ask)
    index.search(QUERIES[0], 2)
    assert asked == [9]
    index.search(Query(sentence=QUERIES[0], without=QUERIES[1]), 2)
    index.search(QUERIES[0], 2, filters=Filters(only=("zz_long.mp4",)))
    assert asked == [9]


def test_export_sends_changes(exact, search_model, shared_videos, tmp_path, capsys):
    """One server is asked while the index changes."""
    videos = shutil.copytree(shared_videos, tmp_path / "videos")
    update = (search_model, videos, tmp_path / "index")
    update_index(*update)
    engine = memory()
    index = Index(update[2], search_model, SearchOptions("qdrant", 100, 1), engine)

    def found() -> set[str]:
        return {hit.video.path for hits in index.search(QUERIES, 20) for hit in hits}

    windows = int(index.state().valid.sum())
    assert windows > 12
    assert engine.export(index.state()) == (windows, 0, 0)
    assert engine.export(index.state()) == (0, 0, windows)
    first, second, third, *_ = sorted(videos.iterdir())
    shutil.copy(first, second)
    third.unlink()
    shutil.copy(first, videos / "new.mp4")
    update_index(*update)
    # Points of another content, or of a file that is gone, are not shown.
    assert found() == {path.name for path in videos.iterdir()} - {second.name, "new.mp4"}
    assert capsys.readouterr().err.count("has windows that the index does not have") == 1
    engine.check(index.state())  # As many windows.
    assert engine.export(index.state()) == (2, 2, windows - 2)
    assert found() == {path.name for path in videos.iterdir()}
    capsys.readouterr()
    engine.check(index.state())
    assert not capsys.readouterr().err
    (videos / "new.mp4").unlink()
    update_index(*update)
    engine.check(index.state())
    line = f"has {windows} windows, and the index {windows - 1}; make or update it with"
    assert line in capsys.readouterr().err
    # Nothing of it is left.
    shutil.rmtree(videos)
    videos.mkdir()
    shutil.copy(shared_videos / "zz_long.mp4", videos / "other.mp4")
    update_index(*update, prune=True)
    with pytest.raises(UserError, match=r"no candidate of drl_jax_\w+ is in the index; .* export"):
        found()


def test_an_interrupted_export_continues(exact, monkeypatch):
    monkeypatch.setattr(qdrant, "_WRITTEN", 5)
    monkeypatch.setattr(qdrant, "_READ", 3)
    engine, state = memory(), exact.state()
    upsert, calls = engine._client.upsert, []

    def interrupted(*arguments, **flags):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return upsert(*arguments, **flags)

    monkeypatch.setattr(engine._client, "upsert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.export(state)
    windows = int(state.valid.sum())
    assert engine.export(state) == (windows - 5, 0, 5)
    assert engine.export(state) == (0, 0, windows)


def test_joined_indexes(exact, search_model, shared_videos, tmp_path):
    """Paths begin with the folders of the parts."""
    parts = []
    for name, suffix in (("one", "zz_*"), ("two", "v*")):
        for path in shared_videos.glob(suffix):
            (tmp_path / name / "videos").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / name / "videos")
        parts.append(tmp_path / name / "index")
        update_index(search_model, tmp_path / name / "videos", parts[-1])
    join(tmp_path / "joined", parts)
    engine = memory()
    index = Index(tmp_path / "joined", search_model, SearchOptions("qdrant", 100, 1), engine)
    assert engine.export(index.state())[0] == int(exact.state().valid.sum())
    expected = Index(tmp_path / "joined", search_model, SearchOptions("exact", refine=1))
    check_same(index.search(QUERIES, 12), expected.search(QUERIES, 12))


@pytest.mark.parametrize("engine", ["scan", "server"])
def test_recall_by_the_number_of_candidates(exact, server, engine):
    windows = int(exact.state().valid.sum())
    index = asking(exact, server, 4) if engine == "server" else exact
    few, all_ = measure_recall(index, QUERIES, [4, windows], 4)
    assert (few["candidates"], all_["candidates"]) == (4, windows)
    text = exact.model.encode_text(QUERIES)
    products = exact.model.interaction.query_vectors(text) @ vectors_of(exact).T
    similarity = np.concatenate(
        [exact.model.similarity(text, stored_windows(video)) for video in exact.videos], axis=1
    )
    slots = np.concatenate([video.slots for video in exact.videos])
    shared = sum(
        len(set(slots[np.argsort(-row)[:4]]) & set(np.argsort(-product)[:4]))
        for row, product in zip(similarity, products, strict=True)
    )
    assert few.pop("recall") == pytest.approx(shared / 12)
    assert all_["recall"] == 1
    assert min(few.values()) > 0


def test_an_interaction_without_vectors_is_one_line(shapes_config, shared_videos, tmp_path):
    model = random_model(shapes_config, "xti")
    (tmp_path / "videos").mkdir()
    shutil.copy(next(shared_videos.glob("v*")), tmp_path / "videos")
    update_index(model, tmp_path / "videos", tmp_path / "index")
    with pytest.raises(UserError, match=r"xti has no vectors .* use --engine=exact"):
        Index(tmp_path / "index", model, SearchOptions("qdrant"), memory())
    with pytest.raises(UserError, match="xti has no vectors that Qdrant can compare"):
        memory().export(Index(tmp_path / "index", model).state())


def test_errors_are_one_line(exact, monkeypatch):
    state = exact.state()
    with pytest.raises(UserError, match=r"no collection drl_jax_\w+ at memory; .*search export"):
        memory().check(state)
    away = Qdrant("http://127.0.0.1:9")
    for call in (away.check, away.export, lambda state: away(state, np.zeros((1, 32)), 3)):
        with pytest.raises(UserError, match=r"^Qdrant at http://127.0.0.1:9: .*refused$"):
            call(state)
    with pytest.raises(UserError, match="needs the URL of a server: --url"):
        Qdrant("")
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'drl_jax\[qdrant\]'"):
        Qdrant("http://127.0.0.1:9")
