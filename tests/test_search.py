"""Queries over real files: scores, moments and explanations, and the commands."""

import dataclasses
import datetime
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import error_of
from support.films import FORM, FPS, SHOTS, shot
from support.search import random_model
from support.videos import write_video

from drl_jax.data.long_video import sample_video
from drl_jax.data.video import read_frames
from drl_jax.data.video_file import open_video
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.runtime.errors import UserError
from drl_jax.search.__main__ import main
from drl_jax.search.encoding import dequantize, unusual
from drl_jax.search.engine import Part
from drl_jax.search.filters import Filters, parse_day
from drl_jax.search.hits import explain, format_clock, format_timestamp
from drl_jax.search.index_file import IndexWriter
from drl_jax.search.query import Query
from drl_jax.search.ranking import SearchOptions
from drl_jax.search.session import Index
from drl_jax.search.update import update_index


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A film of four shots, files of two of them, a still of one, and a picture of none."""
    folder = tmp_path_factory.mktemp("film") / "videos"
    (folder / "sub").mkdir(parents=True)
    shots = [shot(number, seconds) for number, seconds in enumerate(SHOTS)]
    for name, frames in {
        "film.mp4": np.concatenate(shots),
        "shot0.mp4": shots[0],
        "shot3.mp4": shots[3],
        "still.mp4": np.repeat(shots[0][:1], 4 * FPS, axis=0),
        "sub/picture.mp4": shot(5, 1)[:1],
    }.items():
        write_video(folder / name, frames, fps=FPS)
    return folder


@pytest.fixture(scope="module")
def session(search_model, videos):
    update_index(search_model, videos, videos.parent / "index", storage="float32")
    return Index(videos.parent / "index", search_model)


def picture_of(number: int) -> bytes:
    """The first frame of a shot, as `open_picture` gives it."""
    return shot(number, 1)[0].tobytes()


def by_name(hits):
    return {hit.path.name: hit for hit in hits}


# ---------------------------------------------------------------------- hits


@pytest.mark.parametrize("interaction", ["dp", "wti", "xti"])
def test_scores_are_those_of_the_model(
    interaction, search_model, shapes_config, test_videos, tmp_path
):
    model = search_model if interaction == "wti" else random_model(shapes_config, interaction)
    (tmp_path / "videos").mkdir()
    some = sorted(test_videos.iterdir())[:9]
    paths = [Path(shutil.copy(path, tmp_path / "videos")) for path in some]
    update_index(model, tmp_path / "videos", tmp_path / "index", storage="float32")
    sentences = ["a red circle", "two triangles wait", "nothing"]
    session = Index(tmp_path / "index", model)
    expected = model.similarity(model.encode_text(sentences), model.encode_videos(paths))
    for hits, row in zip(session.search(sentences, top=99), expected, strict=True):
        found = {hit.path: hit.score for hit in hits}
        np.testing.assert_allclose([found[path] for path in paths], row, atol=2e-5)
        assert [*found.values()] == sorted(found.values(), reverse=True)
        assert [hit.rank for hit in hits] == [*range(1, len(found) + 1)]
    (similar,) = session.search(Query(video=paths[0]), top=1)
    if interaction != "xti":  # By its transformer, a video is not most similar to itself.
        assert similar.path == paths[0]
        assert similar.score == pytest.approx(1, abs=1e-4)


def test_a_film_is_indexed_as_windows(session):
    state = session.state()
    film, picture = state.video_at("film.mp4"), state.video_at("sub/picture.mp4")
    spans = [(round(window.start), round(window.end)) for window in film.windows]
    # The model has four frames.
    within = [(start, start + 4) for start in range(5, 22, 2)]
    assert spans == [(0, 4), (4, 5), *within, (25, 29), (27, 31)]
    assert film.duration == pytest.approx(31)
    assert (film.times[:4], picture.times) == ((0.0, 1.0, 2.0, 3.0), (0.0,))
    with Image.open(io.BytesIO(film.thumbnails(film.windows[4].frames))) as strip:
        assert strip.size == (4 * 64, 64)
    assert not (session.directory / "spool").exists()


def test_a_hit_is_a_file_with_the_score_of_its_best_window(session, search_model):
    (hits,) = session.search(["a red circle"], top=5)
    assert len({hit.path for hit in hits}) == 5
    for hit in hits:
        assert hit.score == hit.moments[0].score
        assert hit.score == pytest.approx(max(hit.scores), abs=1e-6)
        for moment in hit.moments:
            explanation = moment.explanation
            contribution = explanation.attribution.frame_contribution
            assert contribution.sum() == pytest.approx(moment.score, abs=1e-4)
            assert explanation.tokens == ["[start]", "a", "red", "circle", "[end]"]
            assert explanation.peak() == explanation.times[contribution.argmax()]
            assert explanation.times.min() >= moment.start
    # Windows that were encoded once each, from frames that were encoded once.
    film, frames = by_name(hits)["film.mp4"], []
    with open_video(film.path) as video:
        sample_video(video, search_model.frame_form, frames.append)
    window, text = film.moments[0].window, search_model.encode_text(["a red circle"])
    alone = search_model.encode_videos([np.stack([frames[n] for n in window.frames])])
    assert search_model.similarity(text, alone)[0, 0] == pytest.approx(film.score, abs=2e-3)
    # Exactly, from the features that are stored.
    (stored,) = dequantize({"feat": film.video.record.arrays["feature.image_feat"]}).values()
    refined = search_model.encode_frame_windows(np.asarray(stored), [window.frames])
    assert search_model.similarity(text, refined)[0, 0] == pytest.approx(film.score, abs=1e-6)


def test_how_unusual_a_moment_is(session, search_model):
    hit = by_name(session.search(["a red circle"], top=5)[0])["shot0.mp4"]
    moment, bank = hit.moments[0], session.state().header["bank"]
    video = search_model.encode_videos([read_frames(hit.path, 4, FORM)])
    similarity = search_model.similarity(search_model.encode_text(bank), video)
    assert similarity.shape == (64, 1)
    expected = unusual(hit.score, np.array([similarity.mean(), similarity.std()]))
    assert moment.unusual == pytest.approx(expected, abs=1e-2)
    assert hit.is_weak == (moment.unusual < 2.5)
    # The bank has sentences: to a video, other windows are compared.
    (alike,) = session.search(Query(video=hit.path), top=1)
    assert alike.moments[0].unusual != pytest.approx(moment.unusual, abs=0.1)


# ---------------------------------------------------------------------- queries


def test_a_picture_is_compared_as_a_shot_in_which_nothing_moves(session):
    found = by_name(session.search(Query(picture=picture_of(0)), top=3))
    assert found.keys() == {"still.mp4", "shot0.mp4", "film.mp4"}
    assert found["still.mp4"].score == pytest.approx(1, abs=0.03)
    assert set(found["film.mp4"].moments[0].explanation.tokens) == {"[picture]"}


def test_more_like_a_moment(session):
    film = session.state().video_at("film.mp4")
    hits = session.search(Query(like=(film, 28.0)), top=2)
    windows = {hit.path.name: hit.moments[0].number for hit in hits}
    assert windows == {"film.mp4": 11, "shot3.mp4": 0}


def test_a_video_is_found_by_each_of_its_windows(session, videos):
    """Each moment is explained by the window of the query that it is like."""
    found = by_name(session.search(Query(video=videos / "film.mp4"), top=5))
    for name in ("film.mp4", "shot0.mp4", "shot3.mp4"):
        assert found[name].score == pytest.approx(1, abs=0.03)
    film = found["film.mp4"]
    np.testing.assert_allclose(film.scores, 1, atol=1e-4)
    for moment in film.moments:
        assert moment.explanation.attribution.similarity.diagonal() == pytest.approx(1, abs=1e-4)
    (more,) = session.search(Query(video=videos / "film.mp4"), top=1, moments=9)
    assert len(more.moments) > len(film.moments) == 3
    found = by_name(session.search(Query(video=videos / "shot3.mp4"), top=5))
    moment = found["film.mp4"].moments[0]
    assert moment.number in (11, 12)
    assert 25 <= round(moment.peak) <= 31


def test_scores_of_combined_queries_are_sums(session, videos):
    """Of the windows that are stored: each query refines others."""
    session = Index(session.directory, session.model, SearchOptions(refine=0))

    def found(**query):
        return {hit.path.name: hit.scores for hit in session.search(Query(**query), top=5)}

    sentence, picture, video = "a red circle moves", picture_of(0), videos / "shot0.mp4"
    one = found(sentence=sentence)
    without, other = found(sentence="two words"), found(picture=picture)
    alike = found(video=video)
    both = found(sentence=sentence, picture=picture, without="two words")
    beside = found(sentence=sentence, video=video)
    for name in one:
        expected = one[name] + other[name] - 0.5 * without[name]
        np.testing.assert_allclose(both[name], expected, atol=1e-5)
        np.testing.assert_allclose(beside[name], one[name] + alike[name], atol=1e-5)
    # Of a long video, frames that are spread over it count.
    (hit,) = session.search(Query(sentence=sentence, video=videos / "film.mp4"), top=1)
    assert hit.moments[0].explanation.tokens[1:-1] == sentence.split()


def test_filters_by_day(session):
    today, day = datetime.date.today(), datetime.timedelta(days=1)
    for filters, count in (
        (Filters(until=today - day), 0),
        (Filters(since=today - day, until=today + day), 5),
    ):
        assert len(session.state().filtered(filters)) == count
    assert parse_day("since", "2026-01-31") == datetime.date(2026, 1, 31)
    with pytest.raises(UserError, match="since takes a day as 2026-01-31, not 'monday'"):
        parse_day("since", "monday")


# ---------------------------------------------------------------------- explanations


def test_an_explanation_by_hand():
    one, other = np.eye(2, dtype=np.float32)
    text = {
        "text_feat": np.stack([one, one, other, one, one])[None],
        "text_mask": np.array([[True, True, True, True, False]]),
        "text_weight": np.array([[0.1, 0.2, 0.6, 0.1, 0.0]], np.float32),
    }
    video = {
        "frame_feat": np.stack([2 * other, 3 * one, one]),
        "frame_mask": np.array([True, True, False]),
        "frame_weight": np.array([0.7, 0.3, 0.0], np.float32),
    }
    tokens = ["[start]", "red", "dog", "[end]"]
    explanation = explain(INTERACTIONS["wti"], Part(text), video, tokens, (0.0, 1.5))
    attribution = explanation.attribution
    np.testing.assert_allclose(attribution.similarity, [[0, 1], [0, 1], [1, 0], [0, 1]])
    contributions = [(0.6 + 0.7) / 2, (0.4 + 0.3) / 2]
    np.testing.assert_allclose(attribution.frame_contribution, contributions)
    assert (explanation.peak(), explanation.peak(1.0, 2.0)) == (0.0, 1.5)
    assert [(word, found.tolist()) for word, _, found in explanation.words()] == [
        *(("red", [0, 1]), ("dog", [1, 0]))
    ]


def test_timestamps_are_formatted():
    times = {0: "0:00.0", 9.96: "0:10.0", 62.5: "1:02.5", 3661: "1:01:01.0"}
    assert {seconds: format_timestamp(seconds) for seconds in times} == times
    assert [format_clock(seconds) for seconds in (0, 62.4, 3600)] == ["0:00", "1:02", "1:00:00"]


def test_a_figure_of_a_pair(search_run, videos, tmp_path, capsys):
    """With the model of a run: the file need not be in an index."""
    flags = (f"--workdir={search_run}", "--query=a red circle", f"--video={videos / 'shot0.mp4'}")
    assert main(["explain", *flags, f"--out={tmp_path / 'figure.png'}"]) == 0
    assert "best moment 0:0" in capsys.readouterr().out
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size[0] > 800
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 100
    for name, reason in (("figure.xyz", "xyz"), ("none/figure.png", "No such file")):
        flag = f"--out={tmp_path / name}"
        error = error_of("drl_jax.search", "explain", *flags, flag, capsys=capsys)
        assert f"cannot write {flag}" in error
        assert reason in error.removeprefix(f"cannot write {flag}")


# ---------------------------------------------------------------------- commands


def test_a_name_with_a_newline_is_printed_in_one_line(session):
    ((hit,),) = session.search(["a"], top=1)
    named = dataclasses.replace(hit, path=Path("new\nline.mp4"))
    assert repr(named).count("\n") == repr(hit).count("\n")
    assert r"new\nline.mp4" in repr(named)


def test_the_commands(search_run, videos, tmp_path, monkeypatch, capsys):
    """An index finds the model of a relative path from any directory."""
    index = f"--index={tmp_path / 'index'}"
    monkeypatch.chdir(search_run.parent)
    assert main(["index", f"--workdir={search_run.name}", f"--videos={videos}", index]) == 0
    assert "5 added" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)

    # The run reads 24 tokens, with the start and the end.
    assert main(["query", index, "a red circle", "dog " * 22, "--json", "--top=2"]) == 0
    captured = capsys.readouterr()
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert [answer["query"] for answer in answers] == ["a red circle", "dog " * 22]
    assert "cut to" not in captured.err
    hit = answers[0]["hits"][0]
    assert set(hit) == {
        *(
            "rank",
            "score",
            "weak",
            "same_picture",
            "reranked",
            "found_by",
            "path",
            "duration",
            "moments",
        ),
        "cues",
    }
    moment = hit["moments"][0]
    assert set(moment) == {"start", "end", "peak", "score", "unusual", "explanation"}
    words = [word["word"] for word in moment["explanation"]["words"]]
    assert words == ["a", "red", "circle"]

    flags = ("--json", "--moments=1", "--only=film.mp4", "--only=sub/picture.mp4")
    assert main(["query", index, "dog " * 23, *flags]) == 0
    captured = capsys.readouterr()
    line = "drl_jax.search: 1 of 1 captions cut to data.max_words=24 tokens (start and end"
    assert captured.err.count(line) == 1
    hits = json.loads(captured.out)["hits"]
    assert {Path(hit["path"]).name for hit in hits} == {"film.mp4", "picture.mp4"}
    assert {len(hit["moments"]) for hit in hits} == {1}


def test_sentences_are_ranked_for_a_video(session, videos, tmp_path, capsys):
    sentences = ["a circle", "a cross", "two words more"]
    (tmp_path / "sentences.txt").write_text("\n".join(sentences))
    flags = (f"--video={videos / 'shot0.mp4'}", f"--sentences={tmp_path / 'sentences.txt'}")
    assert main(["query", f"--index={session.directory}", *flags, "--json"]) == 0
    ranked = json.loads(capsys.readouterr().out)["sentences"]
    assert ranked == sorted(ranked, key=lambda one: -one["score"])
    found = [by_name(hits)["shot0.mp4"].score for hits in session.search(sentences, top=5)]
    scores = {one["sentence"]: one["score"] for one in ranked}
    assert scores == pytest.approx(dict(zip(sentences, found, strict=True)), abs=1e-5)


def test_the_prompt_answers_from_the_updated_index(session, tmp_path, monkeypatch, capsys):
    index = shutil.copytree(session.directory, tmp_path / "index")

    def lines():
        yield "a dog"
        with IndexWriter(index) as writer:
            writer.put([], gone=["film.mp4", "shot3.mp4"])
        yield "  a dog "
        yield "dog " * 3000
        yield ""

    answers = lines()
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert main(["query", f"--index={index}"]) == 0
    _, before, after = capsys.readouterr().out.split("a dog\n")
    assert (before.count(".mp4"), after.count(".mp4")) == (5, 3)
    assert "the sentence has 11,999 characters; at most 10,000" in after


MAKE = ("index", "--index=I", "--videos=V")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (MAKE, "name the model with --workdir=RUN or --weights"),
        ((*MAKE, "--workdir=nowhere"), "no run in nowhere"),
        ((*MAKE, "--shard="), "--shard=: write NUMBER/COUNT"),
        (("query", "--index=nowhere", "a dog"), "nowhere; make it with"),
        (
            ("query", "--index=I", "a dog", "--video=v.mp4", "--sentences=s.txt"),
            "--sentences ranks the sentences of its file",
        ),
        (("query", "--index=I", "--sentences=s.txt"), "--sentences needs --video"),
        (("query", "--index=I", "--url=http://h:6333", "a"), "--url needs --engine=qdrant"),
        (("query", "--index=I", "--top=0", "a"), "must be a positive whole number, not '0'"),
        (("query", "a dog"), "required: --index"),
        (("explain", "--query=a", "--video=v.mp4", "--out=f.png"), "name the model with --index"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert message in error_of("drl_jax.search", *arguments, capsys=capsys)
