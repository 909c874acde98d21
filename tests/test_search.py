"""Search on real files: exact, incremental, and consistent after interruptions and updates."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import error_of, run_module, start_interruptible
from support.processes import killing_workers
from support.search import copy_index, random_model
from support.videos import (
    HARD,
    SHARED,
    numbered_frames,
    write_video,
    write_video_of_unknown_codec,
    write_video_with_latin_title,
)

from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.evaluation.evaluator import Evaluator
from drl_jax.evaluation.metrics import metrics_of, query_ranks
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.search import index_file
from drl_jax.search.__main__ import main
from drl_jax.search.commands import format_hits
from drl_jax.search.engine import Part
from drl_jax.search.hits import explain, format_clock, format_timestamp
from drl_jax.search.index_file import IndexPart, IndexWriter, read_progress
from drl_jax.search.query import Query
from drl_jax.search.segments import SearchIndexError, Segment
from drl_jax.search.session import Index
from drl_jax.search.update import update_index


@pytest.fixture
def model(search_model):
    return search_model


@pytest.fixture(scope="module")
def shared_videos(tmp_path_factory):
    """Six small videos that differ, in a folder and its subfolder; not to be changed."""
    folder = tmp_path_factory.mktemp("shared") / "videos"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(6):
        frames = numbered_frames(20 + 10 * (number % 3), 64, 64)
        frames = frames // 2 + rng.integers(0, 128, (1, 64, 64, 3)).astype(np.uint8)
        name = f"sub/{number}.mp4" if number % 2 else f"{number}.mp4"
        write_video(folder / name, frames, fps=10)
    return folder


@pytest.fixture(scope="module")
def shared_index(search_model, shared_videos):
    """An index of these videos (bfloat16); not to be changed."""
    directory = shared_videos.parent / "index"
    report = update_index(search_model, shared_videos, directory)
    assert (report.added, report.changed, report.removed, report.unchanged) == (6, 0, 0, 0)
    return directory


@pytest.fixture(scope="module")
def shared_search(search_model, shared_videos):
    """A session on an index of these videos with exact features (float32)."""
    directory = shared_videos.parent / "float32"
    update_index(search_model, shared_videos, directory, storage="float32")
    return Index(directory, search_model)


@pytest.fixture
def videos(shared_videos, tmp_path):
    """A copy of the videos."""
    return shutil.copytree(shared_videos, tmp_path / "videos")


@pytest.fixture
def index(shared_index, videos, tmp_path):
    """A copy of the index, of the copied videos."""
    return copy_index(shared_index, videos, tmp_path / "index")


def write_other_video(path, level=0):
    """Writes a video that is in no index."""
    write_video(path, numbered_frames(40, 64, 64) // 2 + np.uint8(level), fps=10)


def scores(searcher, top=20):
    """Path -> score of all videos, for one query."""
    return {hit.path.name: hit.score for hit in searcher.search(["a red circle"], top)[0]}


def stored_features(directory):
    """Path -> features of an index."""
    part = IndexPart(directory)
    return {
        (record := one.segment.read(row)).path: record.arrays["window.frame_unit"].tobytes()
        for one in part.listed
        for row in np.flatnonzero(one.live)
    }


# ---------------------------------------------------------------------- exact search


@pytest.mark.parametrize("interaction", ["dp", "wti", "xti"])
def test_search_matches_evaluation(interaction, model, shapes_config, test_videos, tmp_path):
    """The same similarities and ranks, from the mp4 files and from the built dataset."""
    if interaction != model.config.model.interaction:
        model = random_model(shapes_config, interaction)
    dataset = VideoDataset(dataset_dir(model.config))
    split = load_split(dataset, "test", model.config.data)
    evaluation = Evaluator(model.config, dataset, model.layout).run(model.params, split)

    update_index(model, test_videos, tmp_path / "index", storage="float32")
    session = Index(tmp_path / "index", model)
    sentences = [captions[0] for captions in split.captions]
    hits = session.search(sentences, top=32)
    column = {dataset.video_ids[video]: place for place, video in enumerate(split.videos)}
    found_scores = np.zeros((32, 32), np.float32)
    for row, found in enumerate(hits):
        assert [hit.rank for hit in found] == list(range(1, 33))
        for hit in found:
            found_scores[row, column[hit.path.stem]] = hit.score
    np.testing.assert_allclose(found_scores, evaluation.sim_matrix, atol=2e-5)
    by_search = metrics_of(query_ranks(found_scores, np.arange(32)))
    assert by_search["t2v"]["MnR"] == pytest.approx(evaluation.metrics["t2v"]["MnR"], abs=0.2)

    (similar,) = session.search(Query(video=hits[0][0].path), top=1)
    if (
        interaction != "xti"
    ):  # The transformer's similarity of a video and itself is not the largest.
        assert similar.path == hits[0][0].path
        assert similar.score == pytest.approx(1, abs=1e-4)


def test_quantized_storage_is_close(model, shared_videos, shared_index, shared_search, tmp_path):
    exact, sizes = scores(shared_search), []
    update_index(model, shared_videos, tmp_path / "int8", storage="int8")
    for directory in (shared_search.directory, shared_index, tmp_path / "int8"):
        files = (directory / "segments").glob("*/window.frame_unit.bin")
        sizes.append(sum(path.stat().st_size for path in files))
    assert sizes[0] == 2 * sizes[1] == 4 * sizes[2]
    for directory, error in ((shared_index, 5e-3), (tmp_path / "int8", 1e-2)):
        assert scores(Index(directory, model)) == pytest.approx(exact, abs=error)


# ---------------------------------------------------------------------- updates


def test_only_changed_files_are_indexed_again(model, videos, index):
    before = stored_features(index)
    write_other_video(videos / "new.mp4", level=9)
    write_other_video(videos / "0.mp4")
    (videos / "2.mp4").unlink()
    os.utime(videos / "4.mp4", (1, 1))  # Another time, the same content.
    second = update_index(model, videos, index)
    assert (second.added, second.changed, second.removed, second.unchanged) == (1, 1, 1, 4)
    after = stored_features(index)
    assert set(after) == set(before) - {"2.mp4"} | {"new.mp4"}
    assert after["0.mp4"] != before["0.mp4"]
    for path in ("4.mp4", "sub/1.mp4", "sub/3.mp4", "sub/5.mp4"):
        assert after[path] == before[path]
    paths = {hit.path for hit in Index(index, model).search(["x"], top=10)[0]}
    assert paths == {videos / path for path in after}
    third = update_index(model, videos, index)
    assert (third.added, third.changed, third.removed, third.unchanged) == (0, 0, 0, 6)


def test_an_open_session_sees_updates(model, videos, index):
    """A video is deleted and another one added while a session is open."""
    session = Index(index, model)
    old_state, old = session.state(), scores(session)
    (videos / "0.mp4").unlink()
    write_other_video(videos / "2.mp4")
    write_other_video(videos / "new.mp4", level=9)
    update_index(model, videos, index)
    new = scores(session)
    assert set(new) == {"1.mp4", "2.mp4", "3.mp4", "4.mp4", "5.mp4", "new.mp4"}
    assert new == scores(Index(index, model))
    assert {name: new[name] for name in ("1.mp4", "4.mp4")} == pytest.approx(
        {name: old[name] for name in ("1.mp4", "4.mp4")}, abs=1e-6
    )
    # A query that was running meanwhile has the features of the videos it lists.
    hits = session.answer(old_state, Query("a red circle"), 20)
    assert {hit.path.name: hit.score for hit in hits} == old
    update_index(model, videos, index)
    assert session.state() is session.state()  # Nothing changed: not opened again.


def test_a_deleted_and_recreated_index_is_opened_again(model, videos, index):
    session = Index(index, model)
    assert len(scores(session)) == 6
    shutil.rmtree(index)
    with pytest.raises(SearchIndexError, match="no index in"):
        session.search(["x"], top=1)
    (videos / "0.mp4").unlink()
    update_index(model, videos, index)
    assert set(scores(session)) == {f"{number}.mp4" for number in range(1, 6)}


def test_unreadable_files_are_listed_and_not_retried(model, videos, index):
    (videos / "text.mp4").write_text("no video")
    write_video_of_unknown_codec(videos / "unknown.mp4", numbered_frames(20, 64, 64), fps=10)
    write_video_with_latin_title(videos / "latin_title.mp4", numbered_frames(20, 64, 64), fps=10)
    first = update_index(model, videos, index)
    assert first.bad.keys() == {"text.mp4", "unknown.mp4"}
    assert "is not a video: its content is text" in first.bad["text.mp4"]
    assert first.bad["unknown.mp4"] == "has a video codec that FFmpeg cannot decode"
    (videos / "latin\udce9.mp4").write_bytes(b"")  # The byte 0xe9 alone.
    second = update_index(model, videos, index)
    misnamed = {"latin\\udce9.mp4": "its name is not UTF-8; rename it"}
    assert (second.unchanged, second.bad) == (9, {**first.bad, **misnamed})
    (videos / "unknown.mp4").unlink()
    (videos / "latin\udce9.mp4").unlink()
    write_video(videos / "text.mp4", numbered_frames(20, 64, 64), fps=10)
    assert not update_index(model, videos, index).bad


def test_files_that_could_not_be_read_this_time_are_read_by_the_next_update(model, videos, index):
    write_video(videos / "new.mp4", numbered_frames(20, 64, 64), fps=10)
    with killing_workers():
        first = update_index(model, videos, index)
    assert first.unavailable == {"new.mp4": "the process that worked on it died (exit code -9)"}
    assert (first.added, first.bad) == (0, {})
    second = update_index(model, videos, index)
    assert (second.added, second.unavailable) == (1, {})


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="no real clips beside the repository")
def test_real_clips_are_indexed_or_listed(model, tmp_path):
    folder = tmp_path / "videos"
    for name in ("clips", "hard_clips"):
        shutil.copytree(SHARED / name, folder / name)
    report = update_index(model, folder, tmp_path / "index")
    expected = {
        f"hard_clips/{name}": reason for name, reason in HARD.items() if isinstance(reason, str)
    }
    assert report.bad.keys() == expected.keys()
    for name, reason in expected.items():
        assert report.bad[name].startswith(reason)
    files = [path for path in folder.rglob("*") if path.suffix not in ("", ".json", ".txt")]
    assert report.added == len(files)


def test_frame_times_and_thumbnails_are_stored(shared_index, model):
    state = Index(shared_index, model).state()
    video = state.video_at("sub/1.mp4")
    assert video.times == (0.0, 1.0, 2.0)
    assert state.frames_of(video, (0, 1, 2))[:2] == b"\xff\xd8"


# ---------------------------------------------------------------------- interruptions and errors


@pytest.mark.parametrize("sent", [[signal.SIGKILL], 3 * [signal.SIGINT]], ids=["killed", "ctrl-c"])
def test_an_indexer_that_is_ended_loses_nothing(search_run, model, videos, tmp_path, sent):
    for number in range(60):
        shutil.copy(videos / f"{2 * (number % 3)}.mp4", videos / f"copy{number}.mp4")
    flags = [f"--workdir={search_run}", f"--videos={videos}", f"--index={tmp_path / 'killed'}"]
    command = [sys.executable, "-m", "drl_jax.search", "index", *flags]
    options = {"stderr": subprocess.PIPE, "start_new_session": True}
    with start_interruptible(command, **options) as process:
        while process.poll() is None and count_stored(tmp_path / "killed") < 16:
            time.sleep(0.01)
        for number in sent:
            # As a terminal does: also to the processes that decode.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            time.sleep(0.2)
        errors = process.stderr.read()
    assert process.returncode == (-signal.SIGKILL if len(sent) == 1 else 130)
    assert "Traceback" not in errors
    if len(sent) == 3:
        assert errors.splitlines()[-1] == (
            "drl_jax.search: interrupted; the index is kept; rerun the command to continue"
        )
    before = stored_features(tmp_path / "killed")
    assert 16 <= len(before) < 66
    report = update_index(model, videos, tmp_path / "killed")
    assert (report.unchanged, report.added) == (len(before), 66 - len(before))
    after = stored_features(tmp_path / "killed")
    assert {path: after[path] for path in before} == before


def count_stored(directory):
    try:
        return len(stored_features(directory))
    except SearchIndexError:  # Not created yet.
        return 0


def test_other_processes_see_the_progress(model, videos, tmp_path, monkeypatch):
    directory, seen = tmp_path / "index", []
    put = IndexWriter.put

    def watched(writer, *arguments):
        if not arguments[0]:
            return
        seen.append(read_progress(directory))
        with pytest.raises(SearchIndexError, match=r"is being made \(6 of 6 files are read\), and"):
            Index(directory, model)
        put(writer, *arguments)

    monkeypatch.setattr(IndexWriter, "put", watched)
    monkeypatch.setattr(index_file, "_INTERVAL", 0.0)
    update_index(model, videos, directory)
    assert seen == [{"done": 6, "total": 6}]
    assert read_progress(directory) is None
    # Nothing is to be done.
    update_index(model, videos, directory)
    assert not (directory / "indexing.json").exists()


def with_config(base, **groups):
    """The same parameters in a model of another configuration."""
    changed = {
        name: dataclasses.replace(getattr(base.config, name), **fields)
        for name, fields in groups.items()
    }
    return dataclasses.replace(base, config=dataclasses.replace(base.config, **changed))


def test_an_index_belongs_to_its_model_folder_and_storage(model, videos, index):
    other = with_config(model, data={"max_frames": 3})
    with pytest.raises(SearchIndexError, match="was made with another model"):
        update_index(other, videos, index)
    with pytest.raises(SearchIndexError, match="was made with another model"):
        Index(index, other)
    with pytest.raises(SearchIndexError, match="another folder"):
        update_index(model, videos / "sub", index)
    with pytest.raises(SearchIndexError, match="another --storage, bfloat16"):
        update_index(model, videos, index, storage="int8")


def test_an_index_opens_with_another_similarity_block(model, videos, index):
    other = with_config(model, model={"similarity_block": 3})
    assert other.config.model != model.config.model
    assert update_index(other, videos, index).unchanged == 6
    assert scores(Index(index, other)) == scores(Index(index, model))


def test_an_open_index_checks_only_new_features(model, videos, index, monkeypatch):
    session, checked = Index(index, model), []
    verify = Segment.verify
    monkeypatch.setattr(
        Segment,
        "verify",
        lambda s, row: checked.append(s) if not s.verified[row] else None or verify(s, row),
    )
    write_other_video(videos / "new.mp4")
    update_index(model, videos, index)
    checked.clear()
    assert len(scores(session)) == 7
    assert {segment.path(0) for segment in checked} == {"new.mp4"}


# ---------------------------------------------------------------------- explanations


def test_a_video_finds_itself_and_its_sentence(shared_search, shared_videos, tmp_path, capsys):
    session, videos = shared_search, shared_videos
    for name in ("0.mp4", "sub/3.mp4"):
        hits = session.search(Query(video=videos / name), top=3)
        assert hits[0].path == videos / name
        assert hits[0].score == pytest.approx(1, abs=1e-4)
    sentences = ["a circle", "a cross", "two words more"]
    (tmp_path / "sentences.txt").write_text("\n".join(sentences))
    flags = (f"--video={videos / '0.mp4'}", f"--sentences={tmp_path / 'sentences.txt'}")
    assert main(["query", f"--index={session.directory}", *flags, "--json"]) == 0
    ranked = json.loads(capsys.readouterr().out)["sentences"]
    assert sorted(one["sentence"] for one in ranked) == sorted(sentences)
    assert ranked == sorted(ranked, key=lambda one: -one["score"])
    for one in ranked:
        found = {hit.path: hit.score for hit in session.search([one["sentence"]], top=6)[0]}
        assert one["score"] == pytest.approx(found[videos / "0.mp4"], abs=1e-5)


def test_a_score_is_the_sum_of_its_frame_contributions(shared_search):
    (hits,) = shared_search.search(["a red circle"], top=6)
    for hit in hits:
        explanation = hit.moments[0].explanation
        attribution = explanation.attribution
        assert attribution.frame_contribution.sum() == pytest.approx(hit.score, abs=1e-4)
        assert explanation.tokens == ["[start]", "a", "red", "circle", "[end]"]
        assert [word for word, *_ in explanation.words()] == ["a", "red", "circle"]
        assert attribution.token_weight.sum() == pytest.approx(1, abs=1e-5)
        best = attribution.frame_contribution.argmax()
        assert explanation.peak() == explanation.times[best]


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
    assert explanation.tokens == tokens
    np.testing.assert_allclose(attribution.similarity, [[0, 1], [0, 1], [1, 0], [0, 1]])
    contributions = [(0.6 + 0.7) / 2, (0.4 + 0.3) / 2]
    np.testing.assert_allclose(attribution.frame_contribution, contributions)
    assert (explanation.peak(), explanation.peak(1.0, 2.0)) == (0.0, 1.5)
    assert [found.tolist() for *_, found in explanation.words()] == [[0, 1], [1, 0]]


def test_timestamps_are_formatted():
    times = {0: "0:00.0", 9.96: "0:10.0", 62.5: "1:02.5", 3661: "1:01:01.0"}
    assert {seconds: format_timestamp(seconds) for seconds in times} == times
    assert [format_clock(seconds) for seconds in (0, 62.4, 3600)] == ["0:00", "1:02", "1:00:00"]


def test_a_figure_of_a_pair(search_run, test_videos, tmp_path, capsys):
    """Of a file that is in no index, with the model of a run; and errors of the output file."""
    video = sorted(test_videos.iterdir())[0]
    flags = (f"--workdir={search_run}", "--query=a red circle", f"--video={video}")
    drawn = run_module("drl_jax.search", "explain", *flags, f"--out={tmp_path / 'figure.png'}")
    assert "best moment 0:0" in drawn.stdout
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size[0] > 800
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 100
    flag = f"--out={tmp_path / 'figure.xyz'}"
    error = error_of("drl_jax.search", "explain", *flags, flag, capsys=capsys)
    assert f"cannot write {flag}" in error
    assert "xyz" in error.removeprefix(f"cannot write {flag}")
    flag = f"--out={tmp_path / 'none' / 'figure.png'}"
    error = error_of("drl_jax.search", "explain", *flags, flag, capsys=capsys)
    assert f"cannot write {flag} (No such file" in error


# ---------------------------------------------------------------------- prompt and commands


def test_a_name_with_a_newline_is_printed_in_one_line(shared_search):
    ((hit,),) = shared_search.search(["a"], top=1)
    named = dataclasses.replace(hit, path=Path("new\nline.mp4"))
    assert format_hits([named]).count("\n") == format_hits([hit]).count("\n")
    assert r"new\nline.mp4" in format_hits([named])


def test_the_prompt_answers_from_the_updated_index(model, videos, index, monkeypatch, capsys):
    def lines():
        yield "a dog"
        for name in ("0.mp4", "2.mp4", "4.mp4", "sub/1.mp4", "sub/3.mp4"):
            (videos / name).unlink()
        write_other_video(videos / "new.mp4")
        update_index(model, videos, index, prune=True)
        yield "a dog"
        yield "dog " * 3000
        yield ""

    answers = lines()
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    capsys.readouterr()
    assert main(["query", f"--index={index}"]) == 0
    _, before, after = capsys.readouterr().out.split("a dog\n")
    assert before.count(".mp4") == 5
    assert sorted(line.split("/")[-1] for line in after.splitlines() if ".mp4" in line) == [
        "5.mp4",
        "new.mp4",
    ]
    assert "the sentence has 11,999 characters" in after


def test_the_commands(search_run, videos, tmp_path, capsys):
    index = f"--index={tmp_path / 'index'}"
    made = run_module(
        "drl_jax.search", "index", f"--workdir={search_run}", f"--videos={videos}", index
    )
    assert "6 added" in made.stdout
    prompt = run_module("drl_jax.search", "query", index, input="a dog\n  a red circle \n")
    assert "a dog\n" in prompt.stdout
    assert "a red circle\n" in prompt.stdout
    assert prompt.stdout.count(".mp4") == 2 * 5

    assert main(["query", index, "a red circle", "a dog", "--json", "--top=2"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["query"] for answer in answers] == ["a red circle", "a dog"]
    # The run reads 24 tokens; a second sentence may be cut, too, in the same process.
    for sentence, cut in (("dog " * 22, 0), ("dog " * 23, 1), ("cat " * 23, 1)):
        assert main(["query", index, sentence, "a dog", "--json"]) == 0
        said = "drl_jax.search: 1 of 2 captions cut to data.max_words=24 tokens (start and end"
        assert capsys.readouterr().err.count(said) == cut
    hit = answers[0]["hits"][0]
    assert set(hit) == {"rank", "score", "weak", "same_picture", "path", "duration", "moments"}
    moment = hit["moments"][0]
    assert set(moment) == {"start", "end", "peak", "score", "unusual", "explanation"}
    words = moment["explanation"]["words"]
    assert [word["word"] for word in words] == ["a", "red", "circle"]
    only = ("--only=sub/1.mp4", "--only=2.mp4")
    assert main(["query", index, "a dog", "--json", "--moments=1", *only]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert {Path(hit["path"]).name for hit in hits} == {"1.mp4", "2.mp4"}
    assert {len(hit["moments"]) for hit in hits} == {1}
    assert main(["query", index, "a dog", "--only=none.mp4"]) == 1
    assert "no video of the index has the path 'none.mp4'" in capsys.readouterr().err
    # A sentence and a video together: their similarities are added.
    flags = (f"--video={videos / '0.mp4'}", "--json", "--top=6")
    assert main(["query", index, "a dog", *flags]) == 0
    assert main(["query", index, "a dog", "--json", "--top=6"]) == 0
    both, sentence = map(json.loads, capsys.readouterr().out.splitlines())
    assert both["query"] == "a dog"
    score = {hit["path"]: hit["score"] for hit in sentence["hits"]}
    itself = next(hit for hit in both["hits"] if hit["path"].endswith("/0.mp4"))
    assert itself["score"] - score[itself["path"]] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "--index=I", "--videos=V"), "name the model with --workdir=RUN or --weights"),
        (("index", "--index=I", "--videos=V", "--workdir=nowhere"), "no run in nowhere"),
        (
            ("index", "--index=I", "--videos=V", "--shard=16/16"),
            "--shard=16/16: write NUMBER/COUNT",
        ),
        (("index", "--index=I", "--videos=V", "--shard="), "--shard=: write NUMBER/COUNT"),
        (("join", "--index=I", "nowhere"), "no index in nowhere; make it with"),
        (("index", "--index=I", "--videos=V", "--weights=none.pt"), "none.pt"),
        (("query", "--index=nowhere", "a dog"), "no index in nowhere; make it with"),
        (
            ("query", "--index=I", "a dog", "--video=v.mp4", "--sentences=s.txt"),
            "--sentences ranks the sentences of its file",
        ),
        (("query", "--index=I", "--sentences=s.txt"), "--sentences needs --video"),
        (("query", "--index=I", "--url=http://h:6333", "a"), "--url needs --engine=qdrant"),
        (("query", "--index=I", "--top=0", "a"), "must be a positive whole number, not '0'"),
        (("query", "a dog"), "required: --index"),
        (("serve", "--index=nowhere"), "no index in nowhere"),
        (("explain", "--query=a", "--video=v.mp4", "--out=f.png"), "name the model with --index"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert message in error_of("drl_jax.search", *arguments, capsys=capsys)
