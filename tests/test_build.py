"""`python -m data_prep.build` on real files, right and wrong."""

import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, error_line, run_module
from test_video import SHARED, numbered_frames, write_video

from drl_jax.config import Config, DataConfig
from drl_jax.data.records import VideoDataset, dataset_dir

FORM = "32px_4f_raw"


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def msrvtt(tmp_path):
    """Six small videos laid out as MSR-VTT: four to train on, two to test."""
    videos, annotations = tmp_path / "videos", tmp_path / "annotations"
    (videos / "TrainValVideo").mkdir(parents=True)
    annotations.mkdir()
    names = [f"video{n}" for n in range(6)]
    for number, name in enumerate(names):
        write_video(
            videos / "TrainValVideo" / f"{name}.mp4", numbered_frames(10 + 10 * number), fps=10
        )
    sentences = [
        {"video_id": name, "caption": f"caption {k} of {name}", "sen_id": k}
        for name in names
        for k in range(3)
    ]
    (annotations / "MSRVTT_data.json").write_text(json.dumps({"sentences": sentences}))
    for size, count in (("9k", 4), ("7k", 2)):
        rows = [(name,) for name in names[:count]]
        write_csv(annotations / f"MSRVTT_train.{size}.csv", ["video_id"], rows)
    write_csv(
        annotations / "MSRVTT_JSFUSION_test.csv",
        ["key", "vid_key", "video_id", "sentence"],
        [("ret0", "msr4", "video4", "a query, with a comma"), ("ret1", "msr5", "video5", "b")],
    )
    return tmp_path


def build(root, *extra, size=("--image_size=32", "--max_frames=4"), check=True):
    return run_module(
        "data_prep.build",
        "msrvtt",
        f"--videos={root / 'videos'}",
        f"--annotations={root / 'annotations'}",
        f"--data_dir={root / 'data'}",
        *size,
        *extra,
        check=check,
    )


def opened(root, form=FORM):
    return VideoDataset(root / "data" / "msrvtt" / form / "1.0.0")


def test_msrvtt(msrvtt):
    report = build(msrvtt, "--storage=raw").stdout
    dataset = opened(msrvtt)
    assert len(dataset) == 6
    assert dataset.split_names == ["train_9k", "train_7k", "test"]
    train = dataset.split("train_9k")
    assert [dataset.video_ids[v] for v in train.videos] == [f"video{n}" for n in range(4)]
    assert train.captions[1] == [f"caption {k} of video1" for k in range(3)]
    assert len(dataset.split("train_7k").videos) == 2
    test = dataset.split("test")
    assert test.captions == [["a query, with a comma"], ["b"]]
    assert "train_9k: 4 videos, 12 captions" in report
    # Videos are stored once and looked up by position: each has its own number of frames.
    for video, name in enumerate(dataset.video_ids):
        seconds = int(name.removeprefix("video")) + 1
        assert dataset.read_frames(video).shape == (min(seconds, 4), 32, 32, 3)
    levels = dataset.read_frames(test.videos[0]).reshape(4, -1).mean(1)
    np.testing.assert_allclose(levels, [0, 40, 80, 160], atol=2)


def test_jpeg_is_close_to_raw_and_several_forms_live_together(msrvtt):
    build(msrvtt, "--storage=raw")
    build(msrvtt, "--storage=jpeg")
    raw, jpeg = opened(msrvtt), opened(msrvtt, "32px_4f_jpeg")
    for video in range(6):
        difference = raw.read_frames(video).astype(int) - jpeg.read_frames(video)
        assert np.abs(difference).max() <= 6


def test_the_default_form_is_the_one_that_training_looks_for(msrvtt):
    build(msrvtt, size=())
    data = DataConfig(data_dir=str(msrvtt / "data"), holdout=1)
    dataset = VideoDataset(dataset_dir(Config(data=data)))
    assert dataset.read_frames(5).shape == (6, 224, 224, 3)


def test_missing_and_broken_videos_are_listed_and_left_out(msrvtt):
    folder = msrvtt / "videos" / "TrainValVideo"
    (folder / "video0.mp4").unlink()
    (folder / "video1.mp4").write_text("not a video")
    (folder / "video5.mp4").write_bytes(b"")
    (msrvtt / "annotations" / "MSRVTT_train.7k.csv").unlink()
    report = build(msrvtt, "--storage=raw").stdout
    assert "left out 3 videos" in report
    assert "video0: no such file" in report
    assert "video1: cannot be read as a video" in report
    assert "MSRVTT_train.7k.csv (the split train_7k): it is absent" in report
    dataset = opened(msrvtt)
    assert dataset.video_ids == ["video2", "video3", "video4"]
    assert dataset.split("test").captions == [["a query, with a comma"]]
    assert set(dataset.manifest["left_out"]) == {"video0", "video1", "video5"}
    train = dataset.manifest["splits"]["train_9k"]
    assert (train["annotated_videos"], train["videos"], train["captions"]) == (4, 2, 6)
    assert "train_9k: 2 of 4 annotated videos, 6 captions; published videos: 9,000" in report


def test_what_is_built_stays_until_its_replacement_is_whole(msrvtt):
    build(msrvtt, "--storage=raw")
    assert "built already" in build(msrvtt, "--storage=raw").stdout
    for path in (msrvtt / "videos").rglob("*.mp4"):
        path.write_text("broken")
    failed = build(msrvtt, "--storage=raw", "--overwrite", check=False)
    assert "none of the 6 annotated videos can be used" in error_line(failed)
    assert len(opened(msrvtt)) == 6
    assert [p.name for p in (msrvtt / "data" / "msrvtt" / FORM).iterdir()] == ["1.0.0"]


@pytest.fixture
def slow(tmp_path):
    """A dataset whose build takes a while: 40 videos of 200 frames."""
    videos = tmp_path / "videos"
    videos.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (200, 96, 128, 3)).astype(np.uint8)
    write_video(videos / "0.mp4", noise, fps=20)
    for number in range(1, 40):
        shutil.copy(videos / "0.mp4", videos / f"{number}.mp4")
    write_csv(tmp_path / "mine.csv", ["video", "caption"], [(n, f"number {n}") for n in range(40)])
    return tmp_path


def build_slow(root, data_dir):
    flags = (f"--videos={root / 'videos'}", f"--annotations={root / 'mine.csv'}")
    return ["data_prep.build", "custom", *flags, f"--data_dir={data_dir}", "--image_size=64"]


def stored_files(data_dir):
    directory = data_dir / "custom" / "64px_12f_jpeg" / "1.0.0"
    # Hashes: pytest would compare unequal contents for hours.
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def test_a_killed_build_goes_on_where_it_was(slow):
    run_module(*build_slow(slow, slow / "whole"))
    command = [sys.executable, "-m", *build_slow(slow, slow / "killed")]
    entries = slow / "killed" / "cache"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(entries.rglob("*.npz"))) < 8:
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (slow / "killed" / "custom" / "64px_12f_jpeg" / "1.0.0").exists()
    done = {path: path.stat().st_mtime_ns for path in entries.rglob("*.npz")}
    assert 8 <= len(done) < 40
    # One entry as a machine that lost power may leave it.
    damaged = min(done)
    damaged.write_bytes(damaged.read_bytes()[:-500])
    del done[damaged]

    run_module(*build_slow(slow, slow / "killed"))
    assert stored_files(slow / "killed") == stored_files(slow / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == done  # none was decoded again
    forms = [path.name for path in (slow / "killed" / "custom" / "64px_12f_jpeg").iterdir()]
    assert forms == ["1.0.0"]


def test_other_annotations_decode_nothing_again(msrvtt):
    build(msrvtt)
    entries = {p: p.stat().st_mtime_ns for p in (msrvtt / "data" / "cache").rglob("*.npz")}
    assert len(entries) == 6
    before = opened(msrvtt, "32px_4f_jpeg").manifest
    rows = [("ret0", "msr4", "video4", "another query")]
    header = ["key", "vid_key", "video_id", "sentence"]
    write_csv(msrvtt / "annotations" / "MSRVTT_JSFUSION_test.csv", header, rows)
    build(msrvtt, "--overwrite")
    assert {p: p.stat().st_mtime_ns for p in (msrvtt / "data" / "cache").rglob("*.npz")} == entries
    dataset = opened(msrvtt, "32px_4f_jpeg")
    assert dataset.split("test").captions == [["another query"]]
    changed = {
        name
        for name, digest in dataset.manifest["annotations"].items()
        if before["annotations"][name] != digest
    }
    assert changed == {"MSRVTT_JSFUSION_test.csv"}
    # A changed file is another video.
    path = msrvtt / "videos" / "TrainValVideo" / "video0.mp4"
    write_video(path, numbered_frames(40), fps=10)
    build(msrvtt, "--overwrite", "--discard_cache")
    assert opened(msrvtt, "32px_4f_jpeg").read_frames(0).shape[0] == 4
    assert not (msrvtt / "data" / "cache").exists()


def test_a_build_killed_while_it_moved_its_result_gets_the_old_dataset_back(msrvtt):
    build(msrvtt, "--storage=raw")
    place = msrvtt / "data" / "msrvtt" / FORM
    (place / "1.0.0").rename(place / "previous.1.0.0")
    assert "built already" in build(msrvtt, "--storage=raw").stdout
    assert len(opened(msrvtt)) == 6


def test_an_interrupted_build_says_that_it_can_go_on(slow):
    command = [sys.executable, "-m", *build_slow(slow, slow / "data")]

    def heed_interrupts():  # which whoever started the tests in the background turned off
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        while process.poll() is None and not list((slow / "data").rglob("*.npz")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted; what was decoded is kept, and the same command goes on" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("mistake", ["no videos", "no folder", "no column", "no json", "nothing"])
def test_a_mistake_is_one_line(msrvtt, mistake):
    annotations = msrvtt / "annotations"
    if mistake == "no videos":
        shutil.rmtree(msrvtt / "videos" / "TrainValVideo")
        expected = "no video in"
    elif mistake == "no folder":
        shutil.rmtree(msrvtt / "videos")
        expected = "no directory"
    elif mistake == "no column":
        write_csv(annotations / "MSRVTT_train.9k.csv", ["video"], [("video0",)])
        expected = "MSRVTT_train.9k.csv has no column 'video_id'"
    elif mistake == "no json":
        (annotations / "MSRVTT_data.json").write_text("{")
        expected = "MSRVTT_data.json is not a JSON file"
    else:
        for path in annotations.iterdir():
            path.unlink()
        expected = "no split can be read"
    assert expected in error_line(build(msrvtt, "--storage=raw", check=False))
    assert not [path for path in (msrvtt / "data").rglob("*") if path.is_file()]


@pytest.mark.skipif(not (SHARED / "msrvtt").is_dir(), reason="no MSR-VTT files beside the project")
def test_the_real_csv_files_have_their_published_sizes(tmp_path):
    from data_prep.msrvtt.msrvtt_dataset_builder import Builder

    for path in (SHARED / "msrvtt").iterdir():
        shutil.copy(path, tmp_path)
    with (SHARED / "msrvtt" / "MSRVTT_train.9k.csv").open() as file:
        names = [row["video_id"] for row in csv.DictReader(file)]
    sentences = [{"video_id": name, "caption": "a"} for name in names]
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps({"sentences": sentences}))
    annotations = Builder.read_annotations(tmp_path)
    assert len(annotations.splits["train_9k"]) == 9000
    assert len(annotations.splits["test"]) == 1000
    assert set(annotations.missing_files) == {"MSRVTT_train.7k.csv"}
    for split in ("train_9k", "test"):
        low, high = Builder.PUBLISHED[split]["videos"]
        assert low <= len(annotations.splits[split]) <= high
