"""Search with candidates from Qdrant's embedded engine, which takes the same calls as a cluster."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from support.commands import error_of, run_module
from support.search import random_model
from support.videos import numbered_frames, write_video

from drl_jax.runtime.errors import UserError
from drl_jax.search.__main__ import main
from drl_jax.search.indexing import update_index
from drl_jax.search.qdrant import QdrantSearch
from drl_jax.search.recall import measure_recall
from drl_jax.search.session import SearchSession
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


@pytest.fixture(scope="module")
def engine(session):
    engine = QdrantSearch(session, candidates=6)
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


def test_the_engine_ranks_by_the_token_half(session, engine):
    """MaxSim of weighted tokens is sum_l w_l max_f <t_l, v_f>, with the padding's 0."""
    model, index = session.model, session.snapshot()
    stored = index.stored(index.videos)
    frames = stored["frame_unit"] * stored["frame_mask"][..., None]
    text = {name: array[0] for name, array in model.encode_text(QUERIES[:1]).items()}
    # The opposite of the short video: for all tokens, the padding is its maximum.
    short = [video.path for video in index.videos].index("zz_short.mp4")
    opposite = -frames[short].sum(axis=0) / np.linalg.norm(frames[short].sum(axis=0))
    negative = {**text, "text_unit": np.broadcast_to(opposite, text["text_unit"].shape)}
    for query in (text, negative):
        sim = np.einsum("ld,vfd->vlf", query["text_unit"], frames)
        expected = (sim.max(axis=2) * query["text_weight"]).sum(axis=1)
        vectors = model.interaction.query_vectors(query).tolist()
        points = engine._client.query_points(engine.collection, query=vectors, limit=12).points
        scores = {point.payload["path"]: point.score for point in points}
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
        found = [scores[video.path] for video in index.videos]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert scores["zz_short.mp4"] == pytest.approx(0, abs=1e-5)


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


def test_export_sends_changes(own_session, search_model, videos, capsys):
    """One engine is open while the index changes: its session answers from the new index."""
    engine = QdrantSearch(own_session, candidates=12)
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
    assert dataclasses.astuple(engine.export())[1:] == (2, 1, 10)
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
        found.append({index.folder / v.path for v in engine.candidates(index, text, 4)})
    shared = sum(len(a & b) for a, b in zip(exact, found, strict=True))
    assert few.recall == pytest.approx(shared / 12)
    assert min(few.engine_seconds, few.rerank_seconds, few.exact_seconds) > 0


def test_dp_has_one_vector_per_video(shapes_config, shared_videos, tmp_path):
    model = random_model(shapes_config, "dp")
    update_index(model, shared_videos, tmp_path / "dp", storage="float32")
    session = SearchSession(tmp_path / "dp", model)
    engine = QdrantSearch(session, candidates=4)
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
        QdrantSearch(own_session)


def test_an_index_upgraded_from_format_2_keeps_its_collection(own_session):
    names = []
    for fingerprint in ("", own_session.model.fingerprint):  # Before and after the upgrade.
        with IndexWriter(own_session.directory) as store:
            old = own_session.model.format_2_fingerprint
            store.update_header(fingerprint=fingerprint, format_2_fingerprint=old)
        engine = QdrantSearch(own_session)
        names.append(engine.collection)
        engine.close()
    assert names[0] == names[1]


def test_errors_of_engines_are_one_line(own_session):
    engine = QdrantSearch(own_session)
    with pytest.raises(UserError, match=r"make it with: python -m drl_jax.search export"):
        engine.check()
    with pytest.raises(UserError, match="already accessed by another"):
        QdrantSearch(own_session)
    engine.close()
    away = QdrantSearch(own_session, url="http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"Qdrant at http://127.0.0.1:9: .*refused"):
        away.check()


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
    assert head.startswith("12 videos, 3 queries")
    assert columns.split()[:2] == ["candidates", "recall@5"]
    assert [row.split()[0] for row in rows] == ["5", "12"]
    assert rows[1].split()[1] == "100.0"
    error = error_of("drl_jax.search", *recall, "--candidates=1000", capsys=capsys)
    assert "ask for fewer candidates" in error
