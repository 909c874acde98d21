"""Search on real files: exact, incremental, and whole after any interruption."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, error_line, make_run, run_module
from PIL import Image
from test_video import HARD, SHARED, numbered_frames, write_video

from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.evaluation.evaluator import Evaluator
from drl_jax.evaluation.metrics import retrieval_metrics
from drl_jax.pretrained import from_workdir
from drl_jax.search.engine import Gallery, SearchEngine
from drl_jax.search.explain import clock, explain
from drl_jax.search.indexing import update_index
from drl_jax.search.prompt import run_prompt
from drl_jax.search.session import SearchSession
from drl_jax.search.store import IndexedVideo, SearchIndexError, Store
from drl_jax.sharding import make_layout


@pytest.fixture
def model(search_model):
    return search_model


@pytest.fixture
def videos(tmp_path):
    """Six small videos that differ, in a folder and below it."""
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(6):
        frames = numbered_frames(20 + 10 * (number % 3), 64, 64)
        frames = frames // 2 + rng.integers(0, 128, (1, 64, 64, 3)).astype(np.uint8)
        name = f"sub/{number}.mp4" if number % 2 else f"{number}.mp4"
        write_video(folder / name, frames, fps=10)
    return folder


@pytest.mark.parametrize("interaction", ["dp", "wti", "xti"])
def test_search_is_what_evaluation_finds(interaction, shapes_config, test_videos, tmp_path):
    """The same similarities and ranks, from the mp4 files and from the built dataset."""
    config = make_run(tmp_path / "run", shapes_config, interaction)
    model = from_workdir(tmp_path / "run")
    dataset = VideoDataset(dataset_dir(config))
    split = load_split(dataset, "test", config.data)
    evaluation = Evaluator(config, dataset, make_layout()).run(model.params, split)

    update_index(model, test_videos, tmp_path / "index", storage="float32")
    session = SearchSession(tmp_path / "index", model)
    sentences = [captions[0] for captions in split.captions]
    hits = session.search(sentences, top=32)
    column = {dataset.video_ids[video]: place for place, video in enumerate(split.videos)}
    scores = np.zeros((32, 32), np.float32)
    for row, found in enumerate(hits):
        assert [hit.rank for hit in found] == list(range(1, 33))
        for hit in found:
            scores[row, column[hit.path.stem]] = hit.score
    np.testing.assert_allclose(scores, evaluation.sim_matrix, atol=2e-5)
    by_search = retrieval_metrics(scores, np.arange(32))
    assert by_search["t2v"]["MnR"] == pytest.approx(evaluation.metrics["t2v"]["MnR"], abs=0.2)


@pytest.mark.parametrize(("storage", "error"), [("bfloat16", 5e-3), ("int8", 1e-2)])
def test_smaller_storage_is_close(storage, error, model, videos, tmp_path):
    scores = {}
    for kind in ("float32", storage):
        report = update_index(model, videos, tmp_path / kind, storage=kind)
        (hits,) = SearchSession(tmp_path / kind, model).search(["a red circle"], top=6)
        scores[kind] = {hit.path: hit.score for hit in hits}
        scores[f"{kind} bytes"] = report.nbytes
    for path, score in scores["float32"].items():
        assert abs(scores[storage][path] - score) < error
    assert scores[f"{storage} bytes"] < 0.7 * scores["float32 bytes"]


@pytest.mark.parametrize("devices", [1, 8])
def test_blocks_and_devices_change_nothing(devices, model):
    """37 videos, some rows of the arrays free, in blocks that they do not fill."""
    rng = np.random.default_rng(0)
    mask = np.arange(4) < rng.integers(1, 5, (50, 1))
    video = {
        "frame_feat": rng.normal(size=(50, 4, 32)).astype(np.float32),
        "frame_mask": mask,
        "frame_weight": (mask / mask.sum(1, keepdims=True)).astype(np.float32),
    }
    rows = rng.permutation(50)[:37]
    text = model.embedder.captions(model.params, ["one", "two words", "three more words"])
    expected = model.embedder.similarity(model.params, text, {k: v[rows] for k, v in video.items()})
    model = dataclasses.replace(model, layout=make_layout(jax.devices()[:devices]))
    model = dataclasses.replace(model, params=jax.device_put(model.params, model.layout.whole))
    gallery = Gallery(video, rows, model.layout, block=16)
    engine = SearchEngine(model.config.model, model.params)
    for _ in range(2):  # the second time the blocks are on the devices
        ranking = engine.search(text, gallery, top=10)
        order = np.argsort(-expected, axis=1)[:, :10]
        np.testing.assert_array_equal(ranking.slots, rows[order])
        found = np.take_along_axis(expected, order, 1)
        np.testing.assert_allclose(ranking.scores, found, atol=1e-5)
    everything = engine.search(text, gallery, top=100)
    assert everything.slots.shape == (3, 37)
    assert sorted(everything.slots[0]) == sorted(rows)
    few = engine.search(text, gallery.only(rows[5:15]), top=3)
    order = np.argsort(-expected[:, 5:15], axis=1)[:, :3]
    np.testing.assert_array_equal(few.slots, order)


def snapshot(directory):
    """Path -> (slot, features) of an index."""
    with Store(directory) as store:
        arrays = store.arrays()
        return {
            video.path: (video.slot, arrays["frame_feat"][video.slot].tobytes())
            for video in store.videos()
            if video.slot is not None
        }


def test_only_what_changed_is_indexed_again(model, videos, tmp_path):
    index = tmp_path / "index"
    first = update_index(model, videos, index)
    assert (first.added, first.changed, first.removed, first.unchanged) == (6, 0, 0, 0)
    before = snapshot(index)

    write_video(videos / "new.mp4", numbered_frames(30, 64, 64), fps=10)
    write_video(videos / "0.mp4", numbered_frames(40, 64, 64), fps=10)
    (videos / "2.mp4").unlink()
    os.utime(videos / "4.mp4", (1, 1))  # touched, and the same
    second = update_index(model, videos, index)
    assert (second.added, second.changed, second.removed, second.unchanged) == (1, 1, 1, 4)
    after = snapshot(index)
    assert set(after) == set(before) - {"2.mp4"} | {"new.mp4"}
    assert after["0.mp4"][1] != before["0.mp4"][1]
    for path in ("4.mp4", "sub/1.mp4", "sub/3.mp4", "sub/5.mp4"):
        assert after[path] == before[path]
    assert len({slot for slot, _ in after.values()}) == 6
    paths = {hit.path for hit in SearchSession(index, model).search(["x"], top=10)[0]}
    assert paths == {videos / path for path in after}
    third = update_index(model, videos, index)
    assert (third.added, third.changed, third.removed, third.unchanged) == (0, 0, 0, 6)


def test_bad_files_are_listed_and_not_tried_again(model, videos, tmp_path):
    (videos / "text.mp4").write_text("no video")
    first = update_index(model, videos, tmp_path / "index")
    assert first.bad.keys() == {"text.mp4"}
    assert "cannot be read as a video" in first.bad["text.mp4"]
    (videos / "latin\udce9.mp4").write_bytes(b"")  # the byte 0xe9 alone
    second = update_index(model, videos, tmp_path / "index")
    misnamed = {"latin\\udce9.mp4": "its name is not UTF-8; rename it"}
    assert (second.unchanged, second.bad) == (7, {**first.bad, **misnamed})
    (videos / "latin\udce9.mp4").unlink()
    write_video(videos / "text.mp4", numbered_frames(20, 64, 64), fps=10)
    assert not update_index(model, videos, tmp_path / "index").bad


def test_a_killed_indexer_loses_nothing(search_run, model, videos, tmp_path):
    for number in range(60):
        shutil.copy(videos / f"{2 * (number % 3)}.mp4", videos / f"copy{number}.mp4")
    flags = [f"--workdir={search_run}", f"--videos={videos}", f"--index={tmp_path / 'killed'}"]
    command = [sys.executable, "-m", "drl_jax.search", "index", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and stored(tmp_path / "killed") < 16:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = snapshot(tmp_path / "killed")
    assert 16 <= len(before) < 66
    report = update_index(model, videos, tmp_path / "killed")
    assert (report.unchanged, report.added) == (len(before), 66 - len(before))
    after = snapshot(tmp_path / "killed")
    assert {path: after[path] for path in before} == before


def stored(directory):
    try:
        return len(snapshot(directory))
    except (SearchIndexError, KeyError):  # not there yet
        return 0


def test_a_change_that_is_not_committed_leaves_the_old_video(model, videos, tmp_path, monkeypatch):
    """Features are written to a free slot; without the transaction nobody sees them."""
    update_index(model, videos, tmp_path / "index")
    before = snapshot(tmp_path / "index")
    write_video(videos / "0.mp4", numbered_frames(40, 64, 64), fps=10)
    write_rows = Store._write_rows

    def killed(self, name, rows, slots):
        write_rows(self, name, rows, slots)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "_write_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        update_index(model, videos, tmp_path / "index")
    assert snapshot(tmp_path / "index") == before


def test_one_writer_at_a_time(model, videos, tmp_path):
    with (
        Store(tmp_path / "index", write=True),
        pytest.raises(SearchIndexError, match="another process writes to the index"),
    ):
        update_index(model, videos, tmp_path / "index")


def test_an_index_belongs_to_its_model_folder_and_storage(model, videos, tmp_path):
    update_index(model, videos, tmp_path / "index")
    other = dataclasses.replace(model, fingerprint="another")
    with pytest.raises(SearchIndexError, match="was made with another model"):
        update_index(other, videos, tmp_path / "index")
    with pytest.raises(SearchIndexError, match="was made with another model"):
        SearchSession(tmp_path / "index", other)
    with pytest.raises(SearchIndexError, match="another folder"):
        update_index(model, videos / "sub", tmp_path / "index")
    with pytest.raises(SearchIndexError, match="another storage, bfloat16"):
        update_index(model, videos, tmp_path / "index", storage="int8")


def test_a_video_finds_itself_and_its_sentence(model, videos, tmp_path):
    update_index(model, videos, tmp_path / "index", storage="float32")
    session = SearchSession(tmp_path / "index", model)
    for name in ("0.mp4", "sub/3.mp4"):
        hits = session.search_by_video(videos / name, top=3)
        assert hits[0].path == videos / name
        assert hits[0].score == pytest.approx(1, abs=1e-4)
    sentences = ["a circle", "a square", "two words more"]
    ranked = session.rank_sentences(videos / "0.mp4", sentences)
    assert sorted(text for _, text in ranked) == sorted(sentences)
    assert [score for score, _ in ranked] == sorted((s for s, _ in ranked), reverse=True)
    for score, text in ranked:
        found = {hit.path: hit.score for hit in session.search([text], top=6)[0]}
        assert score == pytest.approx(found[videos / "0.mp4"], abs=1e-5)


def test_a_score_is_the_sum_of_its_frames_shares(model, videos, tmp_path):
    update_index(model, videos, tmp_path / "index", storage="float32")
    session = SearchSession(tmp_path / "index", model)
    (hits,) = session.search(["a red circle"], top=6)
    for hit in hits:
        shown = hit.explanation
        assert shown.frame_shares.sum() == pytest.approx(hit.score, abs=1e-4)
        assert shown.words == ["[start]", "a", "red", "circle", "[end]"]
        assert shown.word_weights.sum() == pytest.approx(1, abs=1e-5)
        assert shown.moment == shown.times[shown.frame_shares.argmax()]


def test_an_explanation_by_hand():
    one, other = np.eye(2, dtype=np.float32)
    text = {
        "text_feat": np.stack([one, one, other, one, one]),
        "text_mask": np.array([True, True, True, True, False]),
        "text_weight": np.array([0.1, 0.2, 0.6, 0.1, 0.0], np.float32),
    }
    video = {
        "frame_feat": np.stack([2 * other, 3 * one, one]),
        "frame_mask": np.array([True, True, False]),
        "frame_weight": np.array([0.7, 0.3, 0.0], np.float32),
    }
    shown = explain(text, video, ["[start]", "red", "dog", "[end]"], (0.0, 1.5))
    assert shown.words == ["[start]", "red", "dog", "[end]"]
    np.testing.assert_allclose(shown.similarity, [[0, 1], [0, 1], [1, 0], [0, 1]])
    np.testing.assert_allclose(shown.frame_shares, [(0.6 + 0.7) / 2, (0.4 + 0.3) / 2])
    assert shown.moment == 0.0
    found = [(word, when) for word, when, _, _ in shown.matches()]
    assert found == [("[start]", 1.5), ("red", 1.5), ("dog", 0.0), ("[end]", 1.5)]


def test_the_prompt(model, videos, tmp_path):
    update_index(model, videos, tmp_path / "index")
    session = SearchSession(tmp_path / "index", model)

    def talk(*lines, captions=("a test caption", "another")):
        answers, left = [], list(lines)

        def read(_):
            if not left:
                raise EOFError
            return left.pop(0)

        run_prompt(session, captions, 2, read, answers.append)
        return answers[1:]

    (found,) = talk("t a red circle", "q", "t never asked")
    assert found.splitlines()[0] == "a red circle"
    assert ".mp4" in found
    assert talk("t", "a red circle")[0] == found  # asked for the sentence; then the input ends
    assert talk("i 1")[0].splitlines()[0] == "another"
    assert talk("i 2")[0] == talk("i", "2")[0] == "i takes a number from 0 to 1, not '2'"
    assert talk("i -1")[0] == "i takes a number from 0 to 1, not '-1'"
    assert "there are no captions" in talk("i 0", captions=())[0]
    assert talk("t", "  ")[0] == "a query is blank; write a sentence"
    assert talk("")[0] == talk("x")[0] == talk("?")[0]
    assert "q quits" in talk("")[0]


def test_clock():
    assert [clock(s) for s in (0, 9.96, 62.5, 3661)] == ["0:00.0", "0:10.0", "1:02.5", "1:01:01.0"]


def test_the_commands(search_run, videos, tmp_path):
    index = f"--index={tmp_path / 'index'}"
    made = run_module(
        "drl_jax.search", "index", f"--workdir={search_run}", f"--videos={videos}", index
    )
    assert "6 added" in made.stdout
    asked = run_module(
        "drl_jax.search", "query", index, "a red circle", "a dog", "--json", "--top=2"
    )
    answers = [json.loads(line) for line in asked.stdout.splitlines()]
    assert [answer["query"] for answer in answers] == ["a red circle", "a dog"]
    hit = answers[0]["hits"][0]
    assert set(hit) == {"rank", "score", "path", "moment", "words"}
    assert [word["word"] for word in hit["words"]][1:-1] == ["a", "red", "circle"]
    prompt = run_module("drl_jax.search", "query", index, input="t a dog\ni 5\n\nq\n")
    assert "a dog\n" in prompt.stdout
    # The captions of the run's own test split.
    assert prompt.stdout.count(".mp4") == 2 * 5
    (tmp_path / "sentences.txt").write_text("one\ntwo\n")
    flags = (f"--video={videos / '0.mp4'}", f"--sentences={tmp_path / 'sentences.txt'}")
    ranked = run_module("drl_jax.search", "query", index, *flags)
    assert {line.split()[-1] for line in ranked.stdout.splitlines()} == {"one", "two"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "--index=I", "--videos=V"), "name the model with --workdir=RUN or --weights"),
        (("index", "--index=I", "--videos=V", "--workdir=nowhere"), "no run in nowhere"),
        (("index", "--index=I", "--videos=V", "--weights=none.pt"), "none.pt"),
        (("query", "--index=nowhere", "a dog"), "no index in nowhere; make one with"),
        (("query", "--index=I", "a dog", "--video=v.mp4"), "give sentences or --video"),
        (("query", "--index=I", "--sentences=s.txt"), "--sentences goes with --video"),
        (("query", "--index=I", "--video=v", "--engine=qdrant"), "leave it out with --video"),
        (("query", "--index=I", "--url=http://h:6333", "a"), "go with --engine=qdrant"),
        (("serve", "--index=nowhere"), "no index in nowhere"),
        (("explain", "--query=a", "--video=v.mp4", "--out=f.png"), "name the model with --index"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path):
    failed = run_module("drl_jax.search", *arguments, check=False)
    assert message in error_line(failed)


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="no real clips beside the project")
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


def test_a_full_disk_is_one_line_and_loses_nothing(model, videos, tmp_path, monkeypatch):
    update_index(model, videos, tmp_path / "index")
    before = snapshot(tmp_path / "index")
    write_video(videos / "0.mp4", numbered_frames(40, 64, 64), fps=10)

    def full(self, name, rows, slots):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_write_rows", full)
        with pytest.raises(SearchIndexError, match=r"No space left on device.*the same command"):
            update_index(model, videos, tmp_path / "index")
    assert snapshot(tmp_path / "index") == before
    assert update_index(model, videos, tmp_path / "index").changed == 1


def test_a_figure_of_a_pair(search_run, test_videos, tmp_path):
    """Of a file that is in no index, with the model of a run; and what can go wrong."""
    video = sorted(test_videos.iterdir())[0]
    flags = (f"--workdir={search_run}", "--query=a red circle", f"--video={video}")
    drawn = run_module("drl_jax.search", "explain", *flags, f"--out={tmp_path / 'figure.png'}")
    assert "best moment 0:0" in drawn.stdout
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size[0] > 800
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 100
    for out, message in (("figure.xyz", "xyz"), ("none/figure.png", "No such file")):
        failed = run_module(
            "drl_jax.search", "explain", *flags, f"--out={tmp_path / out}", check=False
        )
        assert f"cannot write --out={tmp_path / out}" in error_line(failed)
        assert message in error_line(failed)


def test_times_of_frames_are_stored(model, videos, tmp_path):
    update_index(model, videos, tmp_path / "index")
    with Store(tmp_path / "index") as store:
        found = {video.path: video for video in store.videos()}
        strip = store.thumbnails("sub/1.mp4")
    assert isinstance(found["sub/1.mp4"], IndexedVideo)
    assert found["sub/1.mp4"].times == (0.0, 1.0, 2.0)
    assert strip[:2] == b"\xff\xd8"
