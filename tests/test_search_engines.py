"""Search with candidates from Qdrant: its engine in this process, and the calls of a server.

No server runs here: the client's own imitation of one takes the calls.
"""

import dataclasses
import json
import shutil
import uuid

import numpy as np
import pytest
from qdrant_client import QdrantClient
from support.commands import error_of, run_module
from support.search import random_model
from support.videos import numbered_frames, write_video

from drl_jax.runtime.errors import UserError
from drl_jax.runtime.lock import locked
from drl_jax.search.__main__ import main
from drl_jax.search.addresses import PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.candidate_engine import Point
from drl_jax.search.candidates import CandidateSearch
from drl_jax.search.filters import Filters
from drl_jax.search.indexing import update_index
from drl_jax.search.qdrant_edge import EdgeCollection, EdgeUpdate
from drl_jax.search.qdrant_server import ServerCollection
from drl_jax.search.recall import measure_recall
from drl_jax.search.session import SearchSession
from drl_jax.search.snapshot import IndexSnapshot
from drl_jax.search.writer import IndexWriter

QUERIES = ["a red circle moves to the left", "a green cross grows", "two words"]


@pytest.fixture(scope="module")
def shared_videos(test_videos, tmp_path_factory):
    """Some test videos, and one with fewer frames than the model reads; not to be changed."""
    folder = tmp_path_factory.mktemp("engines") / "videos"
    folder.mkdir()
    for path in sorted(test_videos.iterdir())[:11]:
        shutil.copy2(path, folder)
    write_video(folder / "zz_short.mp4", numbered_frames(20, 64, 64), fps=10)
    return folder


@pytest.fixture(scope="module")
def session(search_model, shared_videos):
    """A session on an index of these videos; not to be changed."""
    directory = shared_videos.parent / "index"
    update_index(search_model, shared_videos, directory, storage="float32")
    return SearchSession(directory, search_model)


@pytest.fixture(scope="module", params=["in this process", "server"])
def engine(session, request):
    engine = CandidateSearch(session, candidates=6)
    if request.param == "server":
        engine._engine = ServerCollection("memory", engine.collection, QdrantClient(":memory:"))
    engine.export()
    yield engine
    engine.close()


@pytest.fixture
def videos(shared_videos, tmp_path):
    """A copy of the videos."""
    return shutil.copytree(shared_videos, tmp_path / "videos")


@pytest.fixture
def own_session(session, videos, tmp_path):
    """A session on a copy of the index, of the copied videos, without a collection."""
    ignore = shutil.ignore_patterns("qdrant")
    directory = shutil.copytree(session.directory, tmp_path / "index", ignore=ignore)
    with IndexWriter(directory) as store:
        store.update_header(videos=str(videos.resolve()))
    return SearchSession(directory, session.model)


def test_the_engine_ranks_by_the_vectors(session, engine):
    """The dot product of weighted sums: the mean of the similarities of tokens and frames."""
    model, index = session.model, session.snapshot()
    stored = index.stored(index.videos)
    for sentence in QUERIES:
        text = model.encode_text([sentence])
        sim = np.einsum("ld,vfd->vlf", text["text_unit"][0], stored["frame_unit"])
        expected = np.einsum("vlf,l,vf->v", sim, text["text_weight"][0], stored["frame_weight"])
        score_of = dict(zip((v.path for v in index.videos), expected, strict=True))
        vector = model.interaction.query_vectors(text)[0]
        found = [score_of[window["path"]] for window in engine._engine.query(vector, 12)]
        # Stored as float16.
        np.testing.assert_allclose(found, sorted(expected, reverse=True), atol=1e-3)


def test_candidates_are_compared_exactly(session, engine):
    exact = session.search(QUERIES, top=12)
    for found, expected in zip(engine.search(QUERIES, top=12), exact, strict=True):
        # At least as many candidates as hits: all videos.
        assert [hit.path for hit in found] == [hit.path for hit in expected]
        scores = [hit.score for hit in expected]
        np.testing.assert_allclose([hit.score for hit in found], scores, atol=1e-6)
        np.testing.assert_allclose(found[0].moments[0].peak, expected[0].moments[0].peak)
    for found, expected in zip(engine.search(QUERIES, top=3), exact, strict=True):
        score_of = {hit.path: hit.score for hit in expected}
        assert len(found) == 3
        assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
        for hit in found:
            assert hit.score == pytest.approx(score_of[hit.path], abs=1e-6)


def test_the_page_asks_the_engine(session, engine, monkeypatch):
    api = SearchAPI(session, 3, engine)
    compared = []
    rank = IndexSnapshot.rank_windows

    def counted(self, text, top, slots, *arguments, **flags):
        compared.append(None if slots is None else len(slots))
        return rank(self, text, top, slots, *arguments, **flags)

    monkeypatch.setattr(IndexSnapshot, "rank_windows", counted)
    found = api.search(PageQuery(QUERIES[0]))["hits"]
    assert compared == [6]
    assert [h["path"] for h in found] == [h.video.path for h in engine.search(QUERIES[:1], 3)[0]]
    # Later pages have more candidates, and what engines do not answer is compared with all.
    exact = [hit.video.path for hit in session.search(QUERIES[:1], top=12)[0]]
    found = api.search(PageQuery(QUERIES[0], offset=9))["hits"]
    assert [hit["path"] for hit in found] == exact[9:]
    compared.clear()
    api.search(PageQuery(QUERIES[0], without=QUERIES[1]))
    api.search(PageQuery(QUERIES[0], filters=Filters(folder="", min_length=0.1)))
    assert compared[0] is None
    assert compared[1] > 6


def test_export_sends_changes(own_session, search_model, videos, capsys):
    """One engine is open while the index changes: its session answers from the new index."""
    engine = CandidateSearch(own_session, candidates=12)
    assert dataclasses.astuple(engine.export())[1:] == (12, 0, 0)
    assert dataclasses.astuple(engine.export())[1:] == (0, 0, 12)
    first, second, third, *_ = sorted(videos.iterdir())
    shutil.copy(first, second)
    third.unlink()
    shutil.copy(first, videos / "new.mp4")
    update_index(search_model, videos, own_session.directory, storage="float32")
    found = {hit.path.name for hits in engine.search(QUERIES, top=12) for hit in hits}
    # Points of another content, or of a deleted file, are not shown.
    assert found == {path.name for path in videos.iterdir()} - {second.name, "new.mp4"}
    assert dataclasses.astuple(engine.export())[1:] == (2, 2, 10)
    engine.check()
    assert capsys.readouterr().err.count("update it with") == 0
    found = {hit.path.name for hits in engine.search(QUERIES, top=12) for hit in hits}
    assert found == {path.name for path in videos.iterdir()}
    (videos / "new.mp4").unlink()
    update_index(search_model, videos, own_session.directory, storage="float32")
    engine.check()
    assert capsys.readouterr().err.count("update it with") == 1
    engine.close()


def test_recall_by_the_number_of_candidates(session, engine):
    few, all_ = measure_recall(engine, QUERIES, [4, 12], top=4)
    assert (few.candidates, all_.candidates) == (4, 12)
    assert 0 < few.recall <= all_.recall == 1
    exact = [{hit.path for hit in hits} for hits in session.search(QUERIES, top=4)]
    found, index = [], session.snapshot()
    for sentence in QUERIES:
        text = session.model.encode_text([sentence])
        slots = engine.candidates(index, text, 4)
        found.append({index.folder / v.path for v in index.videos.at_slots(slots)})
    shared = sum(len(a & b) for a, b in zip(exact, found, strict=True))
    assert few.recall == pytest.approx(shared / 12)
    assert min(few.engine_seconds, few.rerank_seconds, few.exact_seconds) > 0


def test_dp_has_one_vector_per_video(shapes_config, shared_videos, tmp_path):
    model = random_model(shapes_config, "dp")
    update_index(model, shared_videos, tmp_path / "dp", storage="float32")
    session = SearchSession(tmp_path / "dp", model)
    engine = CandidateSearch(session, candidates=4)
    engine.export()
    found = engine.search(QUERIES, top=4)
    for hits, expected in zip(found, session.search(QUERIES, top=4), strict=True):
        assert [hit.path for hit in hits] == [hit.path for hit in expected]
    engine.close()


def test_an_interaction_without_vectors_is_one_line(own_session):
    config = own_session.model.config
    model = dataclasses.replace(config.model, interaction="xti")
    own_session.model = dataclasses.replace(
        own_session.model, config=dataclasses.replace(config, model=model)
    )
    with pytest.raises(UserError, match=r"xti has no vectors .* search without --engine"):
        CandidateSearch(own_session)


def test_an_index_upgraded_from_format_2_keeps_its_collection(own_session):
    names = []
    for fingerprint in ("", own_session.model.fingerprint):  # Before and after the upgrade.
        with IndexWriter(own_session.directory) as store:
            old = own_session.model.format_2_fingerprint
            store.update_header(fingerprint=fingerprint, format_2_fingerprint=old)
        engine = CandidateSearch(own_session)
        names.append(engine.collection)
        engine.close()
    assert names[0] == names[1]


def test_errors_of_engines_are_one_line(own_session):
    engine = CandidateSearch(own_session)
    with pytest.raises(UserError, match=r"make it with: python -m drl_jax.search export"):
        engine.check()
    with (
        pytest.raises(UserError, match="in use by process"),
        locked(engine._engine.lock, "the collection"),
    ):
        engine.export()
    away = CandidateSearch(own_session, url="http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"Qdrant at http://127.0.0.1:9: .*refused"):
        away.check()


def test_a_damaged_collection_is_one_line(own_session):
    engine = CandidateSearch(own_session)
    engine.export()
    directory = own_session.directory / "qdrant" / engine.collection
    whole = shutil.copytree(directory, directory.with_name("whole"))
    (large,) = sorted(directory.rglob("vectors/*"), key=lambda path: path.stat().st_size)[-1:]
    name = large.relative_to(directory)
    for damage in (
        lambda: (directory / name).unlink(),
        lambda: (directory / name).write_bytes((whole / name).read_bytes()[:100]),
        lambda: (directory / "sizes.json").write_text("{"),
        lambda: (directory / "edge_config.json").write_text("{" * 1000),
    ):
        damage()
        broken = CandidateSearch(own_session)
        for use in (broken.check, broken.export, lambda b=broken: b.search(QUERIES[:1], 2)):
            with pytest.raises(UserError, match=r"delete this directory and export again"):
                use()
        broken.close()
        shutil.rmtree(directory)
        shutil.copytree(whole, directory)
    engine.check()
    assert len(engine.search(QUERIES[:1], 2)[0]) == 2


def test_an_interrupted_export_continues(own_session, monkeypatch):
    """What was written is used, and the collection before it answers until the end."""
    monkeypatch.setattr("drl_jax.search.candidates._BATCH", 5)
    engine = CandidateSearch(own_session, candidates=12)
    upsert, batches = EdgeUpdate.upsert, []

    def interrupted(self, points):
        batches.append(len(points))
        if len(batches) == 2:
            raise KeyboardInterrupt
        upsert(self, points)

    monkeypatch.setattr(EdgeUpdate, "upsert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.export()
    with pytest.raises(UserError, match="make it with"):
        engine.check()
    assert dataclasses.astuple(engine.export())[1:] == (7, 0, 5)
    assert len(engine.search(QUERIES[:1], 12)[0]) == 12
    # A killed process leaves what cannot be opened, or no collection but the one before.
    directory = own_session.directory / "qdrant" / engine.collection
    directory.rename(directory.with_name(f"{directory.name}.old"))
    directory.with_name(f"{directory.name}.new").mkdir()
    # So do earlier versions: another collection.
    (directory.parent / "collection").mkdir()
    assert dataclasses.astuple(engine.export())[1:] == (0, 0, 12)
    assert [path.name for path in directory.parent.iterdir() if path.is_dir()] == [directory.name]


def test_an_open_engine_follows_exports(own_session, search_model, videos):
    """Of other processes, which replace its files."""
    engine, other = CandidateSearch(own_session, candidates=12), CandidateSearch(own_session)
    engine.export()
    assert len(engine.search(QUERIES[:1], 12)[0]) == 12
    sorted(videos.iterdir())[0].unlink()
    update_index(search_model, videos, own_session.directory, storage="float32")
    other.export()
    assert engine._engine.count() == 11
    assert len(engine.search(QUERIES[:1], 12)[0]) == 11
    engine.close()


def test_the_graph_is_built_for_many_vectors(tmp_path):
    """Those that are found by the graph are the nearest ones."""
    rng, count, width = np.random.default_rng(0), 12_000, 512
    centers = np.repeat(rng.normal(size=(100, width)), count // 100, axis=0)
    vectors = (centers + 0.5 * rng.normal(size=(count, width))).astype(np.float32)
    collection = EdgeCollection(tmp_path / "collection")
    with collection.update(width) as update:
        for start in range(0, count, 4000):
            rows = range(start, start + 4000)
            update.upsert([Point(str(uuid.UUID(int=r + 1)), vectors[r], {"r": r}) for r in rows])
    assert collection.count() == count
    assert list((tmp_path / "collection").rglob("*quantized*"))
    found = 0
    for query in vectors[:: count // 10]:
        best = set(np.argsort(-(vectors @ query))[:10].tolist())
        found += len(best & {payload["r"] for payload in collection.query(query, 50)})
    assert found >= 95
    collection.close()


def test_the_commands(own_session, tmp_path, capsys):
    index = f"--index={own_session.directory}"
    assert "12 windows sent" in run_module("drl_jax.search", "export", index).stdout
    flags = ("--engine=qdrant", "--json", "--top=2", QUERIES[0])
    assert main(["query", index, *flags]) == 0
    answer = json.loads(capsys.readouterr().out)
    (hits,) = own_session.search(QUERIES[:1], top=2)
    assert [hit["path"] for hit in answer["hits"]] == [str(hit.path) for hit in hits]
    (tmp_path / "queries.txt").write_text("\n".join(QUERIES))
    recall = ("recall", index, f"--queries={tmp_path / 'queries.txt'}")
    assert main([*recall, "--candidates=5,12,1000", "--top=5"]) == 0
    head, columns, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("12 windows, 3 queries")
    assert columns.split()[:2] == ["candidates", "recall@5"]
    assert [row.split()[0] for row in rows] == ["5", "12"]
    assert rows[1].split()[1] == "100.0"
    error = error_of("drl_jax.search", *recall, "--candidates=1000", capsys=capsys)
    assert "ask for fewer candidates" in error
