"""`python -m data_prep.build`: what it stores, and builds that meet accidents."""

import hashlib
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
from support.commands import ROOT, error_of, run_module, start_interruptible
from support.datasets import custom
from support.files import contents, enlarge, refused, small_disk
from support.processes import killing_workers
from support.videos import numbered_frames, write_video

from data_prep.annotations import Annotations
from data_prep.build import main as build
from data_prep.check import main as check
from data_prep.manifest import annotation_changes
from drl_jax.data.records import VideoDataset
from drl_jax.runtime.files import sha256

SIZE = ("--image_size=128", "--storage=raw")
VARIANT = Path("custom") / "128px_12f_raw_shown_time" / "1.0.0"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Twenty copies of a video of three frames of noise: 147 kB in the cache and in the dataset."""
    root = tmp_path_factory.mktemp("sources")
    (root / "videos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3)).astype(np.uint8)
    write_video(root / "videos" / "0.mp4", noise, fps=1)
    for number in range(1, 20):
        shutil.copy(root / "videos" / "0.mp4", root / "videos" / f"{number}.mp4")
    for count in (2, 10, 20):
        rows = "".join(f"{n},number {n},train\n" for n in range(count))
        (root / f"{count}.csv").write_text(f"video,caption,split\n{rows}")
    return root


@pytest.fixture
def copy(sources, tmp_path) -> Path:
    """Two of the videos, which a test may change, with `mine.csv`."""
    (tmp_path / "videos").mkdir()
    for number in range(2):
        shutil.copy(sources / "videos" / f"{number}.mp4", tmp_path / "videos")
    shutil.copy(sources / "2.csv", tmp_path / "mine.csv")
    return tmp_path


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory) -> Path:
    """The data directory of a build of two videos. Not to be changed."""
    data_dir = tmp_path_factory.mktemp("built") / "data"
    assert build(custom(sources, "2.csv", data_dir, *SIZE)) == 0
    return data_dir


def entries(data_dir):
    """The cached videos and when they were written."""
    return {path: path.stat().st_mtime_ns for path in (data_dir / "cache").rglob("*.npz")}


# ---------------------------------------------------------------- what is stored


def test_jpeg_is_close_to_raw_in_the_same_data_directory(sources, built, tmp_path):
    data_dir = Path(shutil.copytree(built, tmp_path / "data"))
    flags = ("--image_size=128", "--discard_cache")
    assert build(custom(sources, "2.csv", data_dir, *flags)) == 0
    assert not (data_dir / "cache").exists()
    variants = (f"128px_12f_{encoding}_shown_time" for encoding in ("raw", "jpeg"))
    raw, jpeg = (VideoDataset(data_dir / "custom" / variant / "1.0.0") for variant in variants)
    difference = raw.read_frames(1).astype(int) - jpeg.read_frames(1)
    assert 0 < np.abs(difference).mean() < 5  # Of noise from 0 to 255.


def test_missing_and_broken_videos_are_reported_and_left_out(copy, capsys):
    (copy / "videos" / "text.mp4").write_text("not a video")
    (copy / "videos" / "two.mp4").touch()
    (copy / "videos" / "two.avi").touch()
    rows = ["0,a", "1,b", "text,c", "gone,d", "two,e"]
    (copy / "mine.csv").write_text("\n".join(["video,caption,split", *(f"{r},test" for r in rows)]))
    assert build(custom(copy, "mine.csv", copy, *SIZE)) == 0
    report = capsys.readouterr().out
    reasons = {
        "text": "is not a video: its content is text that starts with 'not a video'",
        "gone": "no such file",
        "two": "several files have this name: two.avi, two.mp4",
    }
    assert "left out 3 videos and rows (full list: " in report
    assert all(f"{video}: {reason}" in report for video, reason in reasons.items())
    assert "test: 2 of 5 annotated videos, 2 captions" in report
    dataset = VideoDataset(copy / VARIANT)
    assert list(dataset.video_ids) == ["0", "1"]
    assert list(dataset.split("test").captions) == [["a"], ["b"]]
    assert dataset.manifest["left_out"] == reasons
    # More than half cannot be decoded, and the dataset is kept. An absent file is no loss.
    for number in range(2):
        (copy / "videos" / f"{number}.mp4").write_text("broken")
    arguments = custom(copy, "mine.csv", copy, *SIZE, "--overwrite")
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert "none of the 5 annotated videos can be used; the first: gone: no such file" in line
    write_video(copy / "videos" / "0.mp4", numbered_frames(2), fps=1)
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert "2 of the 3 annotated videos cannot be used, and a build may lose at most 50%" in line
    assert len(VideoDataset(copy / VARIANT)) == 2
    assert [path.name for path in (copy / VARIANT).parent.iterdir()] == ["1.0.0"]
    # What the user has seen and listed is no loss.
    (copy / "custom" / "quarantine.txt").write_text("1\ntext\n")
    assert build(arguments) == 0


def test_hashes_are_those_of_frames_and_of_captions(copy, capsys):
    def rebuilt():
        assert build(custom(copy, "mine.csv", copy, *SIZE, "--overwrite")) == 0
        dataset = VideoDataset(copy / VARIANT)
        return dataset.manifest["content"], dataset.content

    frames, both = rebuilt()
    cached, listing = entries(copy), (copy / "mine.csv").read_text()
    assert len(cached) == 2
    (copy / "mine.csv").write_text(listing.replace("number 1", "other"))
    changed = rebuilt()
    assert changed[0] == frames
    assert changed[1] != both
    assert entries(copy) == cached
    assert VideoDataset(copy / VARIANT).split("train").captions[1] == ["other"]
    # A changed video is decoded again.
    (copy / "mine.csv").write_text(listing)
    write_video(copy / "videos" / "0.mp4", numbered_frames(4), fps=1)
    changed = rebuilt()
    assert changed[0] != frames
    assert changed[1] != both
    assert len(entries(copy)) == 3


# ---------------------------------------------------------------- interrupted builds


def test_an_interrupted_and_killed_build_continues_and_gives_the_same_files(tmp_path):
    """28 videos of 120 frames of noise."""
    (tmp_path / "videos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (120, 96, 128, 3)).astype(np.uint8)
    for number in range(28):
        if number:
            shutil.copy(tmp_path / "videos" / "0.mp4", tmp_path / "videos" / f"{number}.mp4")
        else:
            write_video(tmp_path / "videos" / "0.mp4", noise, fps=20)
    rows = "".join(f"{n},number {n}\n" for n in range(28))
    (tmp_path / "mine.csv").write_text(f"video,caption\n{rows}")
    size, variant = "--image_size=64", Path("custom") / "64px_12f_jpeg_shown_time"
    assert build(custom(tmp_path, "mine.csv", tmp_path / "whole", size)) == 0
    data_dir = tmp_path / "killed"
    command = [sys.executable, "-m", "data_prep.build"]
    command += custom(tmp_path, "mine.csv", data_dir, size)
    done = {}
    for sent in (signal.SIGINT, signal.SIGKILL):
        with start_interruptible(command, stderr=subprocess.PIPE) as process:
            while process.poll() is None and len(entries(data_dir)) < len(done) + 4:
                time.sleep(0.02)
            process.send_signal(sent)
            error = process.stderr.read()
        assert process.returncode == (130 if sent == signal.SIGINT else -sent)
        if sent == signal.SIGINT:
            assert "interrupted; decoded videos are kept; rerun the command to continue" in error
        assert "Traceback" not in error
        assert not (data_dir / variant / "1.0.0").exists()
        done = entries(data_dir)
    assert 8 <= len(done) < 28
    # A truncated entry, as after a power failure.
    damaged = min(done)
    damaged.write_bytes(damaged.read_bytes()[:-500])
    del done[damaged]
    # In another process than the first build: the bytes must not depend on the process.
    run_module(*command[2:])
    stored = [
        {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        for files in (contents(data_dir / variant), contents(tmp_path / "whole" / variant))
    ]
    assert stored[0] == stored[1]
    assert {path.suffix for path in stored[0]} >= {".arrow", ".npy"}
    assert entries(data_dir).items() >= done.items()  # None was decoded again.
    assert [path.name for path in (data_dir / variant).iterdir()] == ["1.0.0"]


# Says that it is about to decode, and hangs there.
HANGING_BUILD = """
import sys, time
import data_prep.retrieval_builder as builder
def hang(*_, **__):
    print("decoding", flush=True)
    time.sleep(600)
builder.decode_clips = hang
from data_prep.build import main
main(sys.argv[1:])
"""


def test_a_second_build_is_refused_and_a_killed_one_does_not_block(sources, tmp_path, capsys):
    arguments = custom(sources, "2.csv", tmp_path, *SIZE)
    command = [sys.executable, "-c", HANGING_BUILD, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        try:
            while first.stdout.readline().strip() != "decoding":
                assert first.poll() is None
            # Another variant uses the same cache.
            for extra in ([], ["--storage=jpeg"]):
                line = error_of("data_prep.build", *arguments, *extra, capsys=capsys)
                holder = f"the dataset in {tmp_path / 'custom'} is in use by process {first.pid}"
                assert holder in line
        finally:
            first.kill()
    assert build(arguments) == 0
    assert len(VideoDataset(tmp_path / VARIANT)) == 2


def test_videos_whose_decoders_are_killed_are_left_for_the_next_build(sources, tmp_path, capsys):
    arguments = custom(sources, "2.csv", tmp_path, *SIZE)
    with killing_workers():
        line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert line == (
        "data_prep.build: 2 of 2 videos could not be decoded, which may not be their fault; the"
        " frames of the others are kept: rerun the command to try these again (with a larger"
        " --timeout if they take too long), or leave them out with a line for each id in"
        f" {tmp_path / 'custom' / 'quarantine.txt'}"
    )
    assert not list((tmp_path / "custom").rglob("*.array_record*"))
    # A check does not put them there.
    with killing_workers():
        assert check(arguments) == 1
    report = json.loads((tmp_path / "custom" / "check.json").read_text())
    assert (report["unavailable"].keys(), report["unusable"]) == ({"0", "1"}, {})
    # One that is killed once costs no video.
    with killing_workers(1):
        assert build(arguments) == 0
    assert len(VideoDataset(tmp_path / VARIANT)) == 2


# ---------------------------------------------------------------- what is there already


def test_changed_annotations_are_not_built_already(sources, built, tmp_path, capsys):
    data_dir, target = built, built / VARIANT
    assert build(custom(sources, "2.csv", data_dir, *SIZE)) == 0
    assert f"{target} is already built; --overwrite rebuilds it" in capsys.readouterr().out
    # The name of the file says nothing.
    shutil.copy(sources / "2.csv", tmp_path / "other.csv")
    other = custom(sources, tmp_path / "other.csv", data_dir, *SIZE)
    assert build(other) == 0
    shutil.copy(sources / "10.csv", tmp_path / "other.csv")
    line = error_of("data_prep.build", *other, capsys=capsys)
    assert line == (
        f"data_prep.build: {target} was built from other annotation files (other.csv is new,"
        " 2.csv is missing); --overwrite rebuilds it"
    )
    # But that of a list of a published dataset does.
    (tmp_path / "val_list.txt").write_text("a")
    before = {"annotations": {"test_list.txt": sha256(tmp_path / "val_list.txt")}}
    now = Annotations({}, files=[tmp_path / "val_list.txt"])
    changes = annotation_changes(before, now, named_by_user=False)
    assert changes == ["val_list.txt is new", "test_list.txt is missing"]
    before = {"annotations": {"val_list.txt": "other"}}
    changes = annotation_changes(before, now, named_by_user=False)
    assert changes == ["val_list.txt has changed"]


@pytest.mark.parametrize("found", ["a link", "a part"])
def test_what_is_no_complete_dataset_is_not_built_already(found, sources, tmp_path, capsys):
    arguments, target = custom(sources, "2.csv", tmp_path, *SIZE), tmp_path / VARIANT
    if found == "a link":
        (tmp_path / "elsewhere").mkdir()
        target.parent.mkdir(parents=True)
        target.symlink_to(tmp_path / "elsewhere")
    else:
        target.mkdir(parents=True)
        (target / "dataset_info.json").write_text("{}")
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert line == f"data_prep.build: {target} is not a complete dataset; --overwrite rebuilds it"
    assert build([*arguments, "--overwrite"]) == 0
    assert len(VideoDataset(target)) == 2
    assert [path.name for path in target.parent.iterdir()] == ["1.0.0"]


def test_a_damaged_dataset_is_not_built_already(sources, built, tmp_path, capsys):
    target = Path(shutil.copytree(built / VARIANT, tmp_path / VARIANT))
    arguments = custom(sources, "2.csv", tmp_path, *SIZE)
    for name in ("manifest.json", "metadata.json", "videos.arrow", "captions.train.arrow"):
        whole = (target / name).read_bytes()
        (target / name).write_text("{}")
        line = error_of("data_prep.build", *arguments, capsys=capsys)
        assert f"{name} is" in line
        source = f"custom --data_dir={tmp_path} --videos=DIR --annotations=PATH"
        assert line.endswith(f"{source} --image_size=128 --max_frames=12 --storage=raw --overwrite")
        (target / name).write_bytes(whole)
    # A build that was killed while it replaced the dataset.
    target.rename(target.with_name("previous.1.0.0"))
    assert build(arguments) == 0
    assert "is already built" in capsys.readouterr().out
    assert len(VideoDataset(target)) == 2


# ---------------------------------------------------------------- disks


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "3m") as disk:
        yield disk


# 10 videos fill the disk while records are written, 20 while frames are cached.
@pytest.mark.parametrize("count", [10, 20])
def test_a_full_disk_is_one_line_and_keeps_the_dataset(count, sources, built, disk, capsys):
    for name in ("custom", "cache"):
        shutil.copytree(built / name, disk / name)
    before = contents(disk / VARIANT)
    arguments = custom(sources, f"{count}.csv", disk, *SIZE, "--overwrite")
    assert error_of("data_prep.build", *arguments, capsys=capsys) == (
        f"data_prep.build: no space left in {disk}; free disk space, then rerun the command"
        " to continue"
    )
    assert contents(disk / VARIANT) == before
    assert [path.name for path in (disk / VARIANT).parent.iterdir()] == ["1.0.0"]
    # With space, the same command continues.
    enlarge(disk, "20m")
    assert build(arguments) == 0
    assert len(VideoDataset(disk / VARIANT)) == count


def test_a_disk_that_cannot_be_written_is_one_line(sources, built, disk, capsys):
    shutil.copytree(built / "custom", disk / "custom")
    arguments = custom(sources, "2.csv", disk, *SIZE)
    with (disk / "fill").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free)
    line = error_of("data_prep.check", *arguments, capsys=capsys)
    assert f"cannot write to {disk / 'custom'} (No space left on device)" in line
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    line = error_of("data_prep.build", *arguments, "--overwrite", capsys=capsys)
    lock = disk / "custom" / ".lock"
    assert f"{lock} cannot be read or written: Read-only file system (EROFS); nothing was" in line
    # What needs no writing works.
    assert build(arguments) == 0
    assert "is already built" in capsys.readouterr().out


def test_a_file_in_place_of_the_data_directory_is_one_line(sources, tmp_path, capsys):
    (tmp_path / "data").write_text("a file")
    arguments = custom(sources, "2.csv", tmp_path / "data", *SIZE)
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert "cannot be read or written: Not a directory" in line
    line = error_of("data_prep.check", *arguments, capsys=capsys)
    assert "data_prep.check: cannot write to" in line


def test_a_cache_entry_that_cannot_be_read_ends_a_build(sources, built, tmp_path, capsys):
    """It is not decoded again: what is wrong with the disk is not known."""
    data_dir = Path(shutil.copytree(built, tmp_path / "data"))
    arguments = custom(sources, "2.csv", data_dir, *SIZE, "--overwrite")
    entry, before = min(entries(data_dir)), contents(data_dir)
    with refused(entry):
        line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert f"{entry.resolve()} cannot be read or written: Too many levels" in line
    assert contents(data_dir) == before


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagenet"], "invalid choice: 'imagenet'"),
        (["msvd"], "msvd needs --videos=DIR and --annotations=DIR"),
        (["custom", "--videos=a"], "custom needs --videos=DIR and --annotations=FILE"),
        (["shapes_stills", "--annotations=a"], "shapes_stills draws its own videos"),
        (["msvd", "--videos=a", "--annotations=b", "--size=smoke"],
         "--size is for shapes, shapes_events, shapes_stills"),
        (["shapes", "--image_size=0"], "must be a positive whole number, not '0'"),
        (["custom", "--annotations={0}/2.csv", "--videos={0}/absent"], "no directory {0}/absent"),
        (["custom", "--annotations={0}/2.csv", "--videos={0}/empty"], "no video in {0}/empty or"),
        (["msvd", "--annotations={0}/absent", "--videos={0}"], "no directory {0}/absent; --ann"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_line(arguments, message, sources, tmp_path, capsys):
    (sources / "empty").mkdir(exist_ok=True)
    arguments = [argument.format(sources) for argument in arguments]
    arguments.append(f"--data_dir={tmp_path}")
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert line.startswith("data_prep.build: ")
    assert message.format(sources) in line
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {".lock"}
