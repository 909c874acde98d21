"""`python -m data_prep.build` on valid and invalid files."""

import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.commands import ROOT, error_line, error_of, run_module
from support.videos import SHARED, numbered_frames, write_video

from data_prep.build import main
from drl_jax.config import Config, DataConfig
from drl_jax.data.records import VideoDataset, dataset_dir

RAW, JPEG = "32px_4f_raw", "32px_4f_jpeg"


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def flags(root, *extra, size=("--image_size=32", "--max_frames=4")):
    return [
        "msrvtt",
        f"--videos={root / 'videos'}",
        f"--annotations={root / 'annotations'}",
        f"--data_dir={root / 'data'}",
        *size,
        *extra,
    ]


def build(root, *extra, **options):
    assert main(flags(root, *extra, **options)) == 0


def opened(root, storage=RAW):
    return VideoDataset(root / "data" / "msrvtt" / storage / "1.0.0")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Six small videos with the layout of MSR-VTT: four for training, two for testing."""
    root = tmp_path_factory.mktemp("sources")
    videos, annotations = root / "videos" / "TrainValVideo", root / "annotations"
    videos.mkdir(parents=True)
    annotations.mkdir()
    names = [f"video{n}" for n in range(6)]
    for number, name in enumerate(names):
        write_video(videos / f"{name}.mp4", numbered_frames(10 + 10 * number), fps=10)
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
    return root


@pytest.fixture(scope="module")
def raw_build(sources, tmp_path_factory) -> tuple[Path, str]:
    """The sources, built as `raw` by the real command, and what it printed."""
    root = tmp_path_factory.mktemp("built") / "root"
    shutil.copytree(sources, root)
    return root, run_module("data_prep.build", *flags(root, "--storage=raw")).stdout


@pytest.fixture
def msrvtt(sources, tmp_path) -> Path:
    """A copy of the sources that a test may change."""
    return Path(shutil.copytree(sources, tmp_path / "msrvtt"))


@pytest.fixture
def built(raw_build, tmp_path) -> Path:
    """A copy of the sources and of their `raw` build that a test may change."""
    return Path(shutil.copytree(raw_build[0], tmp_path / "built"))


def test_msrvtt(raw_build):
    root, report = raw_build
    dataset = opened(root)
    assert len(dataset) == 6
    assert dataset.split_names == ["train_9k", "train_7k", "test"]
    train = dataset.split("train_9k")
    assert [dataset.video_ids[v] for v in train.videos] == [f"video{n}" for n in range(4)]
    assert train.captions[1] == [f"caption {k} of video1" for k in range(3)]
    assert len(dataset.split("train_7k").videos) == 2
    test = dataset.split("test")
    assert list(test.captions) == [["a query, with a comma"], ["b"]]
    assert "train_9k: 4 videos, 12 captions" in report
    # Videos are stored once, each with its own number of frames, and read by record index.
    for video, name in enumerate(dataset.video_ids):
        seconds = int(name.removeprefix("video")) + 1
        assert dataset.read_frames(video).shape == (min(seconds, 4), 32, 32, 3)
    levels = dataset.read_frames(test.videos[0]).reshape(4, -1).mean(1)
    np.testing.assert_allclose(levels, [0, 40, 80, 160], atol=2)


def test_jpeg_is_close_to_raw_in_the_same_data_directory(built):
    build(built, "--storage=jpeg")
    raw, jpeg = opened(built), opened(built, JPEG)
    for video in range(6):
        difference = raw.read_frames(video).astype(int) - jpeg.read_frames(video)
        assert np.abs(difference).max() <= 6


def test_training_opens_the_default_storage(msrvtt):
    build(msrvtt, size=())
    data = DataConfig(data_dir=str(msrvtt / "data"), holdout=1)
    dataset = VideoDataset(dataset_dir(Config(data=data)))
    assert dataset.read_frames(5).shape == (6, 224, 224, 3)


def test_missing_and_broken_videos_are_reported_and_left_out(msrvtt, capsys):
    folder = msrvtt / "videos" / "TrainValVideo"
    (folder / "video0.mp4").unlink()
    (folder / "video1.mp4").write_text("not a video")
    (folder / "video5.mp4").write_bytes(b"")
    (msrvtt / "annotations" / "MSRVTT_train.7k.csv").unlink()
    build(msrvtt, "--storage=raw")
    report = capsys.readouterr().out
    assert "left out 3 videos" in report
    assert "video0: no such file" in report
    assert "video1: is not a video: its content is text" in report
    assert "MSRVTT_train.7k.csv (the split train_7k): not found" in report
    dataset = opened(msrvtt)
    assert list(dataset.video_ids) == ["video2", "video3", "video4"]
    assert list(dataset.split("test").captions) == [["a query, with a comma"]]
    assert set(dataset.manifest["left_out"]) == {"video0", "video1", "video5"}
    train = dataset.manifest["splits"]["train_9k"]
    assert (train["annotated_videos"], train["videos"], train["captions"]) == (4, 2, 6)
    assert "train_9k: 2 of 4 annotated videos, 6 captions; published videos: 9,000" in report
    assert [dataset.protocol(split) for split in ("test", "train_9k", "other")] == [
        "1k-A",
        "9k",
        "",
    ]


def test_a_failed_build_keeps_the_existing_dataset(built, capsys):
    build(built, "--storage=raw")
    assert "is already built" in capsys.readouterr().out
    for path in (built / "videos").rglob("*.mp4"):
        path.write_text("broken")
    failed = run_module(
        "data_prep.build", *flags(built, "--storage=raw", "--overwrite"), check=False
    )
    assert "none of the 6 annotated videos can be used" in error_line(failed)
    assert failed.returncode == 1
    assert len(opened(built)) == 6
    assert [p.name for p in (built / "data" / "msrvtt" / RAW).iterdir()] == ["1.0.0"]


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """A dataset whose build takes a while: 28 videos of 120 frames."""
    root = tmp_path_factory.mktemp("slow")
    videos = root / "videos"
    videos.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (120, 96, 128, 3)).astype(np.uint8)
    write_video(videos / "0.mp4", noise, fps=20)
    for number in range(1, 28):
        shutil.copy(videos / "0.mp4", videos / f"{number}.mp4")
    write_csv(root / "mine.csv", ["video", "caption"], [(n, f"number {n}") for n in range(28)])
    return root


def slow_flags(root, data_dir):
    sources = (f"--videos={root / 'videos'}", f"--annotations={root / 'mine.csv'}")
    return ["custom", *sources, f"--data_dir={data_dir}", "--image_size=64"]


def start(arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep.build", *arguments], cwd=ROOT, **options
    )


def stored_files(data_dir):
    directory = data_dir / "custom" / "64px_12f_jpeg" / "1.0.0"
    # Hashes: pytest's comparison of unequal contents would take hours.
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".arrow", ".npy"}
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_a_killed_build_continues_and_gives_the_same_files(slow, tmp_path):
    assert main(slow_flags(slow, tmp_path / "whole")) == 0
    entries = tmp_path / "killed" / "cache"
    with start(slow_flags(slow, tmp_path / "killed"), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(entries.rglob("*.npz"))) < 8:
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "custom" / "64px_12f_jpeg" / "1.0.0").exists()
    done = {path: path.stat().st_mtime_ns for path in entries.rglob("*.npz")}
    assert 8 <= len(done) < 28
    # A truncated entry, as after a power failure.
    damaged = min(done)
    damaged.write_bytes(damaged.read_bytes()[:-500])
    del done[damaged]

    # In another process than the first build: the bytes must not depend on the process.
    run_module("data_prep.build", *slow_flags(slow, tmp_path / "killed"))
    assert stored_files(tmp_path / "killed") == stored_files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == done  # None was decoded again.
    variant = tmp_path / "killed" / "custom" / "64px_12f_jpeg"
    assert [path.name for path in variant.iterdir()] == ["1.0.0"]


def test_changed_annotations_use_the_cached_frames(msrvtt):
    build(msrvtt)
    entries = {p: p.stat().st_mtime_ns for p in (msrvtt / "data" / "cache").rglob("*.npz")}
    assert len(entries) == 6
    before = opened(msrvtt, JPEG).manifest
    rows = [("ret0", "msr4", "video4", "another query")]
    header = ["key", "vid_key", "video_id", "sentence"]
    write_csv(msrvtt / "annotations" / "MSRVTT_JSFUSION_test.csv", header, rows)
    build(msrvtt, "--overwrite")
    assert {p: p.stat().st_mtime_ns for p in (msrvtt / "data" / "cache").rglob("*.npz")} == entries
    dataset = opened(msrvtt, JPEG)
    assert list(dataset.split("test").captions) == [["another query"]]
    changed = {
        name
        for name, digest in dataset.manifest["annotations"].items()
        if before["annotations"][name] != digest
    }
    assert changed == {"MSRVTT_JSFUSION_test.csv"}
    # A changed video file is decoded again.
    path = msrvtt / "videos" / "TrainValVideo" / "video0.mp4"
    write_video(path, numbered_frames(40), fps=10)
    build(msrvtt, "--overwrite", "--discard_cache")
    assert opened(msrvtt, JPEG).read_frames(0).shape[0] == 4
    assert not (msrvtt / "data" / "cache").exists()


def test_the_content_hash_is_that_of_frames_and_captions(built):
    first = opened(built).content
    assert len(first) == 64
    build(built, "--storage=raw", "--overwrite")
    assert opened(built).content == first
    # Other captions, with the same frames.
    manifest = opened(built).manifest
    path = built / "annotations" / "MSRVTT_JSFUSION_test.csv"
    path.write_text(path.read_text().replace(",b\n", ",c\n"))
    build(built, "--storage=raw", "--overwrite")
    assert opened(built).manifest["content"] == manifest["content"]
    assert opened(built).content != first
    # Other frames, with the same captions.
    path.write_text(path.read_text().replace(",c\n", ",b\n"))
    write_video(built / "videos" / "TrainValVideo" / "video0.mp4", numbered_frames(40), fps=10)
    build(built, "--storage=raw", "--overwrite")
    assert opened(built).content != first


def test_a_build_killed_while_replacing_restores_the_old_dataset(built, capsys):
    variant = built / "data" / "msrvtt" / RAW
    (variant / "1.0.0").rename(variant / "previous.1.0.0")
    build(built, "--storage=raw")
    assert "is already built" in capsys.readouterr().out
    assert len(opened(built)) == 6


def test_an_interrupted_build_says_how_to_continue(slow, tmp_path):
    def default_interrupt():  # Ignored if the tests run in the background.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": default_interrupt}
    with start(slow_flags(slow, tmp_path), **options) as process:
        while process.poll() is None and not list(tmp_path.rglob("*.npz")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted; decoded videos are kept; rerun the command to continue" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("mistake", ["no videos", "no folder", "no column", "no json", "nothing"])
def test_an_input_error_is_one_line(msrvtt, mistake, capsys):
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
    line = error_of("data_prep.build", *flags(msrvtt, "--storage=raw"), capsys=capsys)
    assert line.startswith("data_prep.build: ")
    assert expected in line
    written = [path.name for path in (msrvtt / "data").rglob("*") if path.is_file()]
    assert written == [".lock"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagenet"], "invalid choice: 'imagenet'"),
        (["msvd"], "msvd needs --videos=DIR and --annotations=DIR"),
        (["custom", "--videos=a"], "custom needs --videos=DIR and --annotations=FILE"),
        (["shapes", "--videos=a"], "shapes draws its own videos"),
        (["shapes_stills", "--annotations=a"], "shapes_stills draws its own videos"),
        (
            ["msvd", "--videos=a", "--annotations=b", "--size=smoke"],
            "--size is for shapes and shapes_stills",
        ),
        (["shapes", "--image_size=0"], "must be a positive whole number, not '0'"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data_prep.build: ")
    assert message in line


@pytest.mark.skipif(not (SHARED / "msrvtt").is_dir(), reason="no MSR-VTT files beside the project")
def test_the_original_csv_files_have_their_published_sizes(tmp_path):
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
