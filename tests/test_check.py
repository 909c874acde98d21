"""The validator and the quarantine list."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import error_of
from support.datasets import custom
from support.videos import (
    numbered_frames,
    write_video,
    write_video_of_unknown_codec,
    write_video_with_latin_title,
)

from data_prep.annotations import Annotations, Captioned
from data_prep.build import main as build
from data_prep.check import main as check
from data_prep.splits import shared_captions, shared_videos
from drl_jax.data.records import VideoDataset


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A custom dataset with one example of each problem."""
    root = tmp_path_factory.mktemp("sources")
    videos = root / "videos"
    videos.mkdir()
    for number in range(4):
        write_video(videos / f"good{number}.mp4", numbered_frames(20 + 10 * number), fps=10)
    shutil.copy(videos / "good1.mp4", videos / "copy.mp4")
    write_video(videos / "black.mp4", np.zeros((30, 32, 48, 3), np.uint8), fps=10)
    write_video(videos / "short.mp4", numbered_frames(30)[10:13], fps=10)
    write_video(videos / "whole.mkv", numbered_frames(60), fps=10)
    write_video_with_latin_title(videos / "latin.mp4", numbered_frames(30), fps=10)
    write_video_of_unknown_codec(videos / "unknown.mp4", numbered_frames(30), fps=10)
    (videos / "cut.mkv").write_bytes((videos / "whole.mkv").read_bytes()[:4000])
    (videos / "text.mp4").write_text("no video")
    rows = [
        *("good0,a dog,train", "good1,a cat,train", "good2,A  dog,test", "good3,a bird,test"),
        *("copy,a fish,test", "black,nothing,train", "short,a flash,train", "cut,an end,train"),
        *("text,words,train", "gone,no more,train", "latin,A cat,train", "unknown,b,train"),
        *("good0,dogs,test", "./good3,a bird,test"),
    ]
    (root / "mine.csv").write_text("\n".join(["video,caption,split", *rows]) + "\n")
    return root


@pytest.fixture
def mine(sources, tmp_path) -> list[str]:
    """A copy of the sources in `tmp_path`; returns the arguments of the commands."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    return custom(tmp_path, "mine.csv", tmp_path / "data", "--image_size=32")


def report_of(root):
    return json.loads((root / "data" / "custom" / "check.json").read_text())


def test_every_problem_is_reported_and_builds_leave_out_the_quarantine(mine, tmp_path, capsys):
    assert check(mine) == 1
    out, report = capsys.readouterr().out, report_of(tmp_path)
    unusable = {
        "black": "all its sampled frames are black",
        "text": "is not a video: its content is text that starts with 'no video'",
        "unknown": "has a video codec that FFmpeg cannot decode",
    }
    assert report["missing"] == {"gone": "no such file"}
    assert report["unusable"] == unusable
    assert report["suspicious"].keys() == {"short", "cut"}
    assert "only 3 frames (0.30 s)" in report["suspicious"]["short"]
    implied = "frames, but its duration of 6.0 s at 10.00 frames per second implies 60"
    assert implied in report["suspicious"]["cut"]
    same = {"videos": ["good1", "copy"], "splits": ["test", "train"]}
    assert report["duplicate_videos"] == [same]
    assert report["videos_in_several_splits"] == {
        "train and test": {"videos": ["good0"], "captions": 0}
    }
    assert report["captions_in_several_splits"] == {"train and test": 1}
    assert report["unannotated_files"] == ["whole.mkv"]
    assert report["splits"]["train"]["annotated_videos"] == 9
    assert report["splits"]["train"]["videos"] == 5
    assert report["build"]["videos"] == 8
    for line in (
        "1 annotated videos are missing:",
        "3 videos cannot be used:",
        "1 video files have no annotation",
        "1 videos are in both train and test, with 0 equal captions (the first: good0): results on",
        "1 names are other names of the same file and span, and their captions are",
        "1 captions are in both train and test",
    ):
        assert line in out

    quarantine = tmp_path / "data" / "custom" / "quarantine.txt"
    with quarantine.open("a") as file:
        file.write("good3\tI do not like it\n")
    assert build(mine) == 0
    out = capsys.readouterr().out
    assert f"leaving out 4 videos listed in {quarantine}" in out
    assert "1 videos are in both train and test, with 0 equal captions (the first: good0)" in out
    dataset = VideoDataset(tmp_path / "data" / "custom" / "32px_12f_jpeg_shown_time" / "1.0.0")
    quarantined = {**unusable, "good3": "I do not like it"}
    left_out = {name: f"in quarantine: {reason}" for name, reason in quarantined.items()}
    # A name of a file whose other name is in quarantine stays.
    assert dataset.manifest["left_out"] == {"gone": "no such file", **left_out}
    used = {"good0", "good1", "good2", "./good3", "copy", "short", "cut", "latin"}
    assert set(dataset.video_ids) == used
    assert len(dataset.read_frames(dataset.video_ids.index("latin"))) == 3
    # The next check removes a repaired file from the list, and keeps entries added by hand.
    shutil.copy(tmp_path / "videos" / "good0.mp4", tmp_path / "videos" / "text.mp4")
    check(mine)
    listed = {line.split("\t")[0] for line in quarantine.read_text().splitlines()[1:]}
    assert listed == {"black", "unknown", "good3"}


def test_splits_of_different_protocols_share_videos_by_design():
    captions = {
        "train": {"a": ["A  dog"], "b": ["x"]},
        "full": {"a": ["a dog"]},
        "test": {"b": ["y"]},
    }
    splits = {name: [Captioned(*v) for v in videos.items()] for name, videos in captions.items()}
    annotations, protocols = Annotations(splits), (("train", "test"), ("full",))
    both = {"train and test": {"videos": ["b"], "captions": 0}}
    assert shared_videos(annotations, protocols) == both
    assert shared_captions(annotations, protocols) == {}
    both |= {"train and full": {"videos": ["a"], "captions": 1}}
    assert shared_videos(annotations, ()) == both
    assert shared_captions(annotations, ()) == {"train and full": 1}


def test_a_valid_dataset_has_status_0_and_wrong_annotations_2(mine, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("video,caption\ngood0,same\ngood1,Same\n")
    assert check(mine) == 0
    warned = "all captions of train are equal ('same'): they tell no video from another"
    assert capsys.readouterr().out.splitlines().count(warned) == 1
    (tmp_path / "mine.csv").write_text("film,caption\ngood0,a\n")
    assert check(mine) == 2
    assert "mine.csv has no video; it has film, caption" in capsys.readouterr().err


def test_damaged_files_of_an_earlier_check(mine, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("video,caption\ngood0,a\ntext,c\n")
    report = tmp_path / "data" / "custom" / "check.json"
    quarantine = report.with_name("quarantine.txt")
    report.parent.mkdir(parents=True)
    report.write_text('{"unusable": {"good')
    assert check(mine) == 1
    assert report_of(tmp_path)["unusable"].keys() == {"text"}
    quarantine.write_bytes(b"caf\xe9\ta\n")
    for command in ("check", "build"):
        line = error_of(f"data_prep.{command}", *mine, capsys=capsys)
        assert f"{quarantine} is not text in UTF-8; save it as UTF-8" in line
    quarantine.unlink()
    quarantine.mkdir()
    line = error_of("data_prep.check", *mine, capsys=capsys)
    assert f"{quarantine} must be a text file; move away what has its name" in line
