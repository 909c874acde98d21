"""Builds and checks of a dataset that meet another build, changed files, or a full disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.commands import ROOT, error_line, error_of, run_module
from support.processes import killing_workers
from support.videos import write_video

from data_prep.annotations import Annotations
from data_prep.build import main as build
from data_prep.check import main as check
from data_prep.manifest import annotation_changes
from drl_jax.data.records import VideoDataset
from drl_jax.runtime.files import sha256

VARIANT = Path("custom") / "128px_12f_raw" / "1.0.0"


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


def flags(sources, annotations, data_dir, *extra):
    return [
        "custom",
        f"--videos={sources / 'videos'}",
        f"--annotations={annotations}",
        f"--data_dir={data_dir}",
        "--image_size=128",
        "--storage=raw",
        *extra,
    ]


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
    arguments = flags(sources, sources / "2.csv", tmp_path)
    first = subprocess.Popen(
        [sys.executable, "-c", HANGING_BUILD, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with first:
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


def test_builds_at_once_leave_one_good_dataset(sources, tmp_path):
    command = [sys.executable, "-m", "data_prep.build"]
    arguments = flags(sources, sources / "20.csv", tmp_path, "--overwrite")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    builds = [subprocess.Popen([*command, *arguments], cwd=ROOT, **options) for _ in range(2)]
    statuses = []
    for process in builds:
        out, error = process.communicate()
        finished = subprocess.CompletedProcess([], process.returncode, out, error)
        statuses.append(process.returncode)
        if process.returncode:
            assert "is in use by process" in error_line(finished)
    assert 0 in statuses
    dataset = VideoDataset(tmp_path / VARIANT)
    assert list(dataset.video_ids) == [f"{n}" for n in range(20)]
    assert {dataset.read_frames(video).shape for video in range(20)} == {(3, 128, 128, 3)}
    assert [path.name for path in (tmp_path / VARIANT).parent.iterdir()] == ["1.0.0"]


def test_a_killed_decoder_costs_no_video(sources, tmp_path):
    with killing_workers(1):
        assert build(flags(sources, sources / "2.csv", tmp_path)) == 0
    assert len(VideoDataset(tmp_path / VARIANT)) == 2


def test_videos_whose_decoders_are_killed_again_are_left_for_the_next_build(
    sources, tmp_path, capsys
):
    arguments = flags(sources, sources / "2.csv", tmp_path)
    with killing_workers():
        line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert line == (
        "data_prep.build: 2 of 2 videos could not be decoded, which may not be their fault; the"
        " frames of the others are kept: rerun the command to try these again (with a larger"
        " --timeout if they take too long), or leave them out with a line for each id in"
        f" {tmp_path / 'custom' / 'quarantine.txt'}"
    )
    assert not (tmp_path / VARIANT).parent.exists() or not any(
        (tmp_path / VARIANT).parent.iterdir()
    )
    # A check does not put them there.
    with killing_workers():
        assert check(arguments) == 1
    report = json.loads((tmp_path / "custom" / "check.json").read_text())
    assert (report["unavailable"].keys(), report["unusable"]) == ({"0", "1"}, {})
    assert build(arguments) == 0
    assert len(VideoDataset(tmp_path / VARIANT)) == 2


def test_changed_annotations_are_not_built_already(sources, tmp_path, capsys):
    shutil.copy(sources / "2.csv", tmp_path / "mine.csv")
    arguments = flags(sources, tmp_path / "mine.csv", tmp_path / "data")
    assert build(arguments) == 0
    assert build(arguments) == 0
    assert "is already built; --overwrite rebuilds it" in capsys.readouterr().out
    shutil.copy(sources / "10.csv", tmp_path / "mine.csv")
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert line == (
        f"data_prep.build: {tmp_path / 'data' / VARIANT} was built from other annotation files"
        " (mine.csv has changed); --overwrite rebuilds it"
    )
    assert build([*arguments, "--overwrite"]) == 0
    assert len(VideoDataset(tmp_path / "data" / VARIANT)) == 10
    (tmp_path / "mine.csv").rename(tmp_path / "other.csv")
    arguments = flags(sources, tmp_path / "other.csv", tmp_path / "data")
    assert build(arguments) == 0  # The same content.
    assert "is already built; --overwrite rebuilds it" in capsys.readouterr().out
    shutil.copy(sources / "20.csv", tmp_path / "other.csv")
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert "(other.csv is new, mine.csv is missing)" in line


def test_a_renamed_list_of_another_dataset_is_a_change(tmp_path):
    (tmp_path / "val_list.txt").write_text("a")
    before = {"annotations": {"test_list.txt": sha256(tmp_path / "val_list.txt")}}
    now = Annotations({}, files=[tmp_path / "val_list.txt"])
    changes = annotation_changes(before, now, named_by_user=False)
    assert changes == ["val_list.txt is new", "test_list.txt is missing"]


@pytest.mark.parametrize("found", ["an empty directory", "a file", "a link", "a part"])
def test_what_is_no_complete_dataset_is_not_built_already(found, sources, tmp_path, capsys):
    arguments, target = flags(sources, sources / "2.csv", tmp_path), tmp_path / VARIANT
    if found == "a file":
        target.parent.mkdir(parents=True)
        target.write_text("no dataset")
    elif found == "a link":
        (tmp_path / "elsewhere").mkdir()
        target.parent.mkdir(parents=True)
        target.symlink_to(tmp_path / "elsewhere")
    else:
        target.mkdir(parents=True)
    if found == "a part":
        (target / "dataset_info.json").write_text("{}")
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert line == f"data_prep.build: {target} is not a complete dataset; --overwrite rebuilds it"
    assert build([*arguments, "--overwrite"]) == 0
    assert len(VideoDataset(target)) == 2
    assert [path.name for path in target.parent.iterdir()] == ["1.0.0"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("manifest.json", content) for content in (
            '{"annotations": [1]}', '{"annotations": {"a": 1}}', '{"files": "a"}', "[]", "{")),
        ("metadata.json", "{}"), ("videos.arrow", ""), ("captions.train.arrow", ""),
    ],
)  # fmt: skip
def test_a_damaged_dataset_is_not_built_already(name, content, sources, tmp_path, capsys):
    arguments = flags(sources, sources / "2.csv", tmp_path)
    assert build(arguments) == 0
    (tmp_path / VARIANT / name).write_text(content)
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert f"{name} is" in line
    source = f"custom --data_dir={tmp_path} --videos=DIR --annotations=PATH"
    assert line.endswith(f"{source} --image_size=128 --max_frames=12 --storage=raw --overwrite")
    assert build([*arguments, "--overwrite"]) == 0
    assert len(VideoDataset(tmp_path / VARIANT)) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


# 10 videos fill the disk while records are written, 20 while frames are cached.
@pytest.mark.parametrize("count", [10, 20])
def test_a_full_disk_is_one_line_and_keeps_the_dataset(count, sources, small_disk):
    assert build(flags(sources, sources / "2.csv", small_disk)) == 0
    content = VideoDataset(small_disk / VARIANT).content
    arguments = flags(sources, sources / f"{count}.csv", small_disk, "--overwrite")
    failed = run_module("data_prep.build", *arguments, check=False)
    assert error_line(failed) == (
        f"data_prep.build: no space left in {small_disk}; free disk space, then rerun the command"
        " to continue"
    )
    dataset = VideoDataset(small_disk / VARIANT)
    assert dataset.content == content
    assert dataset.read_frames(1).shape == (3, 128, 128, 3)
    assert [path.name for path in (small_disk / VARIANT).parent.iterdir()] == ["1.0.0"]
    # With space, the same command continues.
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert build(arguments) == 0
    assert len(VideoDataset(small_disk / VARIANT)) == count


def test_a_check_on_a_full_disk_is_one_line(sources, small_disk, capsys):
    with (small_disk / "fill").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free)
    line = error_of(
        "data_prep.check", *flags(sources, sources / "2.csv", small_disk), capsys=capsys
    )
    assert f"cannot write to {small_disk / 'custom'} (No space left on device)" in line


def test_a_directory_that_cannot_be_written_is_one_line(sources, small_disk, capsys):
    arguments = flags(sources, sources / "2.csv", small_disk)
    assert build(arguments) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = error_of("data_prep.build", *arguments, "--overwrite", capsys=capsys)
    lock = small_disk / "custom" / ".lock"
    assert f"{lock} cannot be read or written: Read-only file system (EROFS); nothing was" in line
    assert "Read-only file system" in error_of("data_prep.check", *arguments, capsys=capsys)
    # What needs no writing works.
    capsys.readouterr()
    assert build(arguments) == 0
    assert "is already built" in capsys.readouterr().out
    assert len(VideoDataset(small_disk / VARIANT)) == 2


def test_a_file_in_place_of_the_data_directory_is_one_line(sources, tmp_path, capsys):
    (tmp_path / "data").write_text("a file")
    arguments = flags(sources, sources / "2.csv", tmp_path / "data")
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert "cannot be read or written" in line
    assert "Not a directory" in line
