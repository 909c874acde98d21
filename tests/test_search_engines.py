"""Search by candidates of an engine: here Qdrant's embedded one, which takes a cluster's calls."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import error_line, make_run, run_module
from test_video import numbered_frames, write_video

from drl_jax.pretrained import from_workdir
from drl_jax.runtime.errors import UserError
from drl_jax.search.indexing import update_index
from drl_jax.search.qdrant import QdrantSearch, _query_vectors
from drl_jax.search.session import SearchSession

QUERIES = ["a red circle moves to the left", "a green square grows", "two words"]


@pytest.fixture
def videos(test_videos, tmp_path):
    """Some of the test videos, in a folder of their own, and one shorter than the model reads."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in sorted(test_videos.iterdir())[:11]:
        shutil.copy2(path, folder)
    write_video(folder / "zz_short.mp4", numbered_frames(20, 64, 64), fps=10)
    return folder


@pytest.fixture
def session(search_model, videos, tmp_path):
    update_index(search_model, videos, tmp_path / "index", storage="float32")
    return SearchSession(tmp_path / "index", search_model)


@pytest.fixture
def engine(session):
    engine = QdrantSearch(session, candidates=6)
    engine.export()
    yield engine
    engine.close()


def test_the_engine_ranks_by_the_words_half(session, engine):
    """MaxSim of weighted words is sum_l w_l max_f <t_l, v_f>, the padding's 0 included."""
    text = session.model.embed_sentences(QUERIES[:1])
    stored = session.stored(session.videos)
    frames = stored["frame_feat"] * stored["frame_mask"][..., None]
    sim = np.einsum("ld,vfd->vlf", text["text_feat"][0], frames)
    expected = (sim.max(axis=2) * text["text_weight"][0]).sum(axis=1)
    points = engine._client.query_points(
        engine.collection, query=_query_vectors(text), limit=12
    ).points
    paths = [session.videos[row].path for row in np.argsort(-expected)]
    assert [point.payload["path"] for point in points] == paths
    scores = [point.score for point in points]
    np.testing.assert_allclose(scores, np.sort(expected)[::-1], atol=1e-5)
    assert scores[0] == pytest.approx(0, abs=1e-5)  # of the short video, whose padding wins


def test_candidates_are_compared_exactly(session, engine):
    exact = session.search(QUERIES, top=12)
    for found, expected in zip(engine.search(QUERIES, top=12), exact, strict=True):
        # As many candidates as are asked for: all of them.
        assert [hit.path for hit in found] == [hit.path for hit in expected]
        scores = [hit.score for hit in expected]
        np.testing.assert_allclose([hit.score for hit in found], scores, atol=1e-6)
        np.testing.assert_allclose(found[0].explanation.moment, expected[0].explanation.moment)
    for found, expected in zip(engine.search(QUERIES, top=3), exact, strict=True):
        score_of = {hit.path: hit.score for hit in expected}
        assert len(found) == 3
        assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
        for hit in found:
            assert hit.score == pytest.approx(score_of[hit.path], abs=1e-6)


def test_export_sends_what_changed(session, engine, search_model, videos, capsys):
    assert dataclasses.astuple(engine.export())[1:] == (0, 0, 12)
    first, second, third, *_ = sorted(videos.iterdir())
    shutil.copy(first, second)
    third.unlink()
    shutil.copy(first, videos / "new.mp4")
    engine.close()
    update_index(search_model, videos, session.directory, storage="float32")
    newer = QdrantSearch(SearchSession(session.directory, search_model), candidates=12)
    found = {hit.path.name for hits in newer.search(QUERIES, top=12) for hit in hits}
    # What the engine has of other contents, or of no file, is not shown.
    assert found == {path.name for path in videos.iterdir()} - {second.name, "new.mp4"}
    assert dataclasses.astuple(newer.export())[1:] == (2, 1, 10)
    newer.check()
    assert capsys.readouterr().err.count("brings it up to date") == 0
    found = {hit.path.name for hits in newer.search(QUERIES, top=12) for hit in hits}
    assert found == {path.name for path in videos.iterdir()}
    newer.close()


def test_recall_by_the_number_of_candidates(session, engine):
    few, all_ = engine.recall(QUERIES, [4, 12], top=4)
    assert (few.candidates, all_.candidates) == (4, 12)
    assert 0 < few.recall <= all_.recall == 1
    exact = [{hit.path for hit in hits} for hits in session.search(QUERIES, top=4)]
    found = []
    for sentence in QUERIES:
        text = session.model.embed_sentences([sentence])
        found.append({session.folder / video.path for video in engine.candidates(text, 4)})
    shared = sum(len(a & b) for a, b in zip(exact, found, strict=True))
    assert few.recall == pytest.approx(shared / 12)
    assert min(few.engine_seconds, few.rerank_seconds, few.exact_seconds) > 0


def test_dp_is_one_vector_a_video(shapes_config, videos, tmp_path):
    make_run(tmp_path / "run", shapes_config, "dp")
    model = from_workdir(tmp_path / "run")
    update_index(model, videos, tmp_path / "dp", storage="float32")
    session = SearchSession(tmp_path / "dp", model)
    engine = QdrantSearch(session, candidates=4)
    engine.export()
    found = engine.search(QUERIES, top=4)
    for hits, expected in zip(found, session.search(QUERIES, top=4), strict=True):
        assert [hit.path for hit in hits] == [hit.path for hit in expected]
    engine.close()


def test_xti_has_no_vectors(session):
    config = session.model.config
    model = dataclasses.replace(config.model, interaction="xti")
    session.model = dataclasses.replace(
        session.model, config=dataclasses.replace(config, model=model)
    )
    with pytest.raises(UserError, match=r"xti compares .* search without --engine"):
        QdrantSearch(session)


def test_mistakes_of_engines(session):
    engine = QdrantSearch(session)
    with pytest.raises(UserError, match=r"make it with: python -m drl_jax.search export"):
        engine.check()
    with pytest.raises(UserError, match="already accessed by another"):
        QdrantSearch(session)
    engine.close()
    away = QdrantSearch(session, url="http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"Qdrant at http://127.0.0.1:9: .*refused"):
        away.check()


def test_the_commands(session, tmp_path):
    index = f"--index={session.directory}"
    assert "12 videos sent" in run_module("drl_jax.search", "export", index).stdout
    asked = run_module(
        *("drl_jax.search", "query", index, "--engine=qdrant", "--json", "--top=2", QUERIES[0])
    )
    (hits,) = session.search(QUERIES[:1], top=2)
    answer = json.loads(asked.stdout)
    assert [hit["path"] for hit in answer["hits"]] == [str(hit.path) for hit in hits]
    (tmp_path / "queries.txt").write_text("\n".join(QUERIES))
    report = run_module(
        *("drl_jax.search", "recall", index, f"--queries={tmp_path / 'queries.txt'}"),
        *("--candidates=5,12,1000", "--top=5"),
    )
    head, columns, *rows = report.stdout.splitlines()
    assert head.startswith("12 videos, 3 queries")
    assert columns.split()[:2] == ["candidates", "recall@5"]
    assert [row.split()[0] for row in rows] == ["5", "12"]
    assert rows[1].split()[1] == "100.0"
    many = ("--candidates=1000", f"--queries={tmp_path / 'queries.txt'}")
    failed = run_module("drl_jax.search", "recall", index, *many, check=False)
    assert "ask for fewer candidates" in error_line(failed)
