"""The validator and the quarantine list."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import error_of, run_module
from support.videos import (
    HARD,
    SHARED,
    numbered_frames,
    write_video,
    write_video_of_unknown_codec,
    write_video_with_latin_title,
)

from data_prep.build import main as build
from data_prep.check import main as check
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
    (videos / "cut.mkv").write_bytes((videos / "whole.mkv").read_bytes()[:4000])
    (videos / "text.mp4").write_text("no video")
    rows = [
        ("good0", "a dog", "train"),
        ("good1", "a cat", "train"),
        ("good2", "A  dog", "test"),
        ("good3", "a bird", "test"),
        ("copy", "a fish", "test"),
        ("black", "nothing", "train"),
        ("short", "a flash", "train"),
        ("cut", "an end", "train"),
        ("text", "words", "train"),
        ("gone", "no more", "train"),
    ]
    lines = ["video,caption,split", *(",".join(row) for row in rows)]
    (root / "mine.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def mine(sources, tmp_path) -> list[str]:
    """A copy of the sources in `tmp_path`; returns the flags of the commands."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    return [
        "custom",
        f"--videos={tmp_path / 'videos'}",
        f"--annotations={tmp_path / 'mine.csv'}",
        f"--data_dir={tmp_path / 'data'}",
        "--image_size=32",
    ]


def test_the_validator_reports_every_problem(mine, tmp_path):
    finished = run_module("data_prep.check", *mine, check=False)
    assert finished.returncode == 1, finished.stderr
    out = finished.stdout
    report = json.loads((tmp_path / "data" / "custom" / "check.json").read_text())
    assert report["missing"] == {"gone": "no such file"}
    assert report["unusable"].keys() == {"black", "text"}
    assert report["unusable"]["black"] == "all its sampled frames are black"
    assert report["suspicious"].keys() == {"short", "cut"}
    assert "only 3 frames (0.30 s)" in report["suspicious"]["short"]
    assert (
        "frames, but its duration of 6.0 s at 10.00 frames per second implies 60"
        in report["suspicious"]["cut"]
    )
    assert report["duplicate_videos"] == [
        {"videos": ["good1", "copy"], "splits": ["test", "train"]}
    ]
    assert report["captions_in_several_splits"] == {"train and test": 1}
    assert report["unannotated_files"] == ["whole.mkv"]
    assert report["splits"]["train"]["annotated_videos"] == 7
    assert report["splits"]["train"]["videos"] == 4
    assert report["build"]["videos"] == 7
    for line in (
        "1 annotated videos are missing:",
        "2 videos cannot be used:",
        "1 video files have no annotation",
    ):
        assert line in out


def test_a_video_with_its_caption_in_two_splits_is_reported(mine, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text(
        "video,caption,split\ngood0,A dog,train\ngood0,a cat,train\ngood1,a bird,train\n"
        "good0,a  dog,test\ngood2,a fish,test\ngood1,an owl,val\n"
    )
    assert check(mine) == 0
    report = json.loads((tmp_path / "data" / "custom" / "check.json").read_text())
    assert report["videos_in_several_splits"] == {
        "train and test": {"videos": ["good0"], "captions": 1},
        "train and val": {"videos": ["good1"], "captions": 0},
    }
    assert report["captions_in_several_splits"] == {"train and test": 1}
    line = "1 videos are in both train and test, with 1 equal captions (the first: good0)"
    assert line in capsys.readouterr().out


def test_splits_of_different_protocols_share_videos_by_design(tmp_path, capsys):
    annotations = tmp_path / "annotations"
    (tmp_path / "videos").mkdir()
    annotations.mkdir()
    names = ["video0", "video1", "video2"]
    for name in names:
        write_video(tmp_path / "videos" / f"{name}.mp4", numbered_frames(30), fps=10)
    splits = dict(zip(names, ("train", "validate", "test"), strict=True))
    document = {
        "videos": [{"video_id": name, "split": split} for name, split in splits.items()],
        "sentences": [{"video_id": name, "caption": f"this is {name}"} for name in names],
    }
    (annotations / "MSRVTT_data.json").write_text(json.dumps(document))
    (annotations / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo1\n")
    (annotations / "MSRVTT_train.7k.csv").write_text("video_id\nvideo0\n")
    test = annotations / "MSRVTT_JSFUSION_test.csv"
    test.write_text("video_id,sentence\nvideo2,this is video2\n")
    arguments = [
        *("msrvtt", "--image_size=32", f"--data_dir={tmp_path}"),
        *(f"--{name}={tmp_path / name}" for name in ("videos", "annotations")),
    ]
    assert check(arguments) == 0
    assert "are in both" not in capsys.readouterr().out
    # A test video in the training list.
    test.write_text("video_id,sentence\nvideo1,this is video1\n")
    assert check(arguments) == 0
    out = capsys.readouterr().out
    assert "1 videos are in both train_9k and test, with 1 equal captions" in out
    assert "full_" not in "".join(line for line in out.splitlines() if "in both" in line)


def test_one_bad_file_does_not_end_a_command(mine, tmp_path):
    videos, frames = tmp_path / "videos", numbered_frames(30)
    write_video_with_latin_title(videos / "latin.mp4", frames, fps=10)
    write_video_of_unknown_codec(videos / "unknown.mp4", frames, fps=10)
    (tmp_path / "mine.csv").write_text("video,caption\nunknown,a\nlatin,b\ngood0,c\n")
    assert check(mine) == 1
    report = json.loads((tmp_path / "data" / "custom" / "check.json").read_text())
    expected = {"unknown": "has a video codec that FFmpeg cannot decode"}
    assert report["unusable"] == expected
    (tmp_path / "data" / "custom" / "quarantine.txt").unlink()
    assert build(mine) == 0
    dataset = VideoDataset(tmp_path / "data" / "custom" / "32px_12f_jpeg" / "1.0.0")
    assert dataset.manifest["left_out"] == expected
    assert list(dataset.video_ids) == ["latin", "good0"]
    assert len(dataset.read_frames(0)) == 3


def test_builds_leave_out_the_quarantine_and_manual_entries_stay(mine, tmp_path, capsys):
    assert check(mine) == 1
    quarantine = tmp_path / "data" / "custom" / "quarantine.txt"
    with quarantine.open("a") as file:
        file.write("good3\tI do not like it\n")
    assert build(mine) == 0
    assert f"leaving out 3 videos listed in {quarantine}" in capsys.readouterr().out
    dataset = VideoDataset(tmp_path / "data" / "custom" / "32px_12f_jpeg" / "1.0.0")
    left_out = dataset.manifest["left_out"]
    assert left_out["good3"] == "in quarantine: I do not like it"
    assert left_out["black"] == "in quarantine: all its sampled frames are black"
    assert set(dataset.video_ids) == {"good0", "good1", "good2", "copy", "short", "cut"}
    # The next check removes a repaired file from the list, and keeps entries added by hand.
    shutil.copy(tmp_path / "videos" / "good0.mp4", tmp_path / "videos" / "text.mp4")
    check(mine)
    assert {line.split("\t")[0] for line in quarantine.read_text().splitlines()[1:]} == {
        "black",
        "good3",
    }


def test_a_valid_dataset_has_status_0_and_wrong_annotations_2(mine, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("video,caption\ngood0,a\ngood1,b\ngood2,c\n")
    assert check(mine) == 0
    (tmp_path / "mine.csv").write_text("film,caption\ngood0,a\n")
    assert check(mine) == 2
    assert "mine.csv has no video; it has film, caption" in capsys.readouterr().err


@pytest.mark.skipif(not (SHARED / "hard_clips").is_dir(), reason="no hard clips beside the project")
def test_hard_clips_are_stored_correctly_or_left_out(tmp_path):
    names = [name for name in sorted(HARD) if (SHARED / "hard_clips" / name).is_file()]
    (tmp_path / "hard.csv").write_text(
        "video,caption\n" + "".join(f"{name},a clip\n" for name in names)
    )
    flags = [
        "custom",
        f"--videos={SHARED / 'hard_clips'}",
        f"--annotations={tmp_path / 'hard.csv'}",
    ]
    assert build([*flags, f"--data_dir={tmp_path}", "--timeout=60"]) == 0
    dataset = VideoDataset(tmp_path / "custom" / "224px_12f_jpeg" / "1.0.0")
    for name in names:
        if isinstance(HARD[name], str):
            assert dataset.manifest["left_out"][name].startswith(HARD[name])
        else:
            frames = dataset.read_frames(dataset.video_ids.index(name))
            assert len(frames) == HARD[name]
            assert frames.reshape(len(frames), -1).max(1).min() > 0


def test_damaged_files_of_an_earlier_check(mine, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("video,caption\ngood0,a\ngood1,b\ntext,c\n")
    check(mine)
    report = tmp_path / "data" / "custom" / "check.json"
    quarantine = tmp_path / "data" / "custom" / "quarantine.txt"
    assert quarantine.read_text().splitlines()[1].startswith("text\t")
    report.write_text(report.read_text()[:40])
    assert check(mine) == 1
    assert json.loads(report.read_text())["unusable"].keys() == {"text"}
    quarantine.write_bytes(b"caf\xe9\ta\n")
    for command in ("check", "build"):
        line = error_of(f"data_prep.{command}", *mine, capsys=capsys)
        assert f"{quarantine} is not text in UTF-8; save it as UTF-8" in line
    quarantine.unlink()
    quarantine.mkdir()
    for command in ("check", "build"):
        line = error_of(f"data_prep.{command}", *mine, capsys=capsys)
        assert f"{quarantine} must be a text file; move away what has its name" in line


def test_a_report_that_cannot_be_written_is_one_line(mine, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("video,caption\ngood0,a\ngood1,b\ngood2,c\n")
    (tmp_path / "data").write_text("a file in place of the directory")
    assert check(mine) == 2
    assert "data_prep.check: cannot write to" in capsys.readouterr().err
