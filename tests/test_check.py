"""The doctor, the quarantine that builds honour, and the comparison with a fresh decode."""

import json
import shutil

import numpy as np
import pytest
from test_build import msrvtt  # noqa: F401 (a fixture)
from test_video import HARD, SHARED, numbered_frames, write_video

from data_prep.build import main as build
from data_prep.check import main as check
from data_prep.compare import main as compare
from drl_jax.data.records import VideoDataset


@pytest.fixture
def mine(tmp_path):
    """A dataset of one's own with something of everything; returns the flags of the commands."""
    videos = tmp_path / "videos"
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
    (tmp_path / "mine.csv").write_text("\n".join(lines) + "\n")
    return [
        "custom",
        f"--videos={videos}",
        f"--annotations={tmp_path / 'mine.csv'}",
        f"--data_dir={tmp_path / 'data'}",
        "--image_size=32",
    ]


def test_the_doctor_names_everything(mine, tmp_path, capsys):
    assert check(mine) == 1
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "data" / "custom" / "check.json").read_text())
    assert report["missing"] == {"gone": "no such file"}
    assert report["unusable"].keys() == {"black", "text"}
    assert report["unusable"]["black"] == "all its sampled frames are black"
    assert report["suspicious"].keys() == {"short", "cut"}
    assert "only 3 frames (0.30 s)" in report["suspicious"]["short"]
    assert "frames where its 6.0 s at 10.00 a second would have 60" in report["suspicious"]["cut"]
    assert report["duplicate_videos"] == [
        {"videos": ["good1", "copy"], "splits": ["test", "train"]}
    ]
    assert report["captions_in_several_splits"] == {"train and test": 1}
    assert report["unannotated_files"] == ["whole.mkv"]
    assert report["splits"]["train"]["annotated_videos"] == 7
    assert report["splits"]["train"]["videos"] == 4
    assert report["build"]["videos"] == 7
    for line in ("1 annotated, and not there:", "2 cannot be used:", "1 video files are not"):
        assert line in out


def test_builds_honour_the_quarantine_and_hand_written_lines_stay(mine, tmp_path, capsys):
    check(mine)
    quarantine = tmp_path / "data" / "custom" / "quarantine.txt"
    with quarantine.open("a") as file:
        file.write("good3\tI do not like it\n")
    assert build(mine) == 0
    assert f"{quarantine} keeps 3 videos out" in capsys.readouterr().out
    dataset = VideoDataset(tmp_path / "data" / "custom" / "32px_12f_jpeg" / "1.0.0")
    left_out = dataset.manifest["left_out"]
    assert left_out["good3"] == "in quarantine: I do not like it"
    assert left_out["black"] == "in quarantine: all its sampled frames are black"
    assert set(dataset.video_ids) == {"good0", "good1", "good2", "copy", "short", "cut"}
    # A file that was mended leaves the list at the next check; what a person wrote stays.
    shutil.copy(tmp_path / "videos" / "good0.mp4", tmp_path / "videos" / "text.mp4")
    check(mine)
    assert {line.split("\t")[0] for line in quarantine.read_text().splitlines()[1:]} == {
        "black",
        "good3",
    }


def test_a_sound_dataset_passes(mine, tmp_path):
    (tmp_path / "mine.csv").write_text("video,caption\ngood0,a\ngood1,b\ngood2,c\n")
    assert check(mine) == 0
    (tmp_path / "mine.csv").write_text("film,caption\ngood0,a\n")
    assert check(mine) == 2


def test_stored_frames_are_compared_with_the_files(mine, tmp_path, capsys):
    flags = ["custom", f"--videos={tmp_path / 'videos'}", f"--data_dir={tmp_path / 'data'}"]
    assert compare(flags) == 1
    assert "no form of custom is built" in capsys.readouterr().err
    (tmp_path / "mine.csv").write_text("video,caption\ngood0,a\ngood1,b\ngood2,c\nwhole,d\n")
    build(mine)
    build([*mine, "--storage=raw"])
    capsys.readouterr()
    assert compare(flags) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["32px_12f_raw"] == ["4", "0", "0.000"]
    assert rows["32px_12f_jpeg"][0] == "4"
    assert 0 <= float(rows["32px_12f_jpeg"][2]) < 3
    # Another video of the same length under the name, and one that is gone.
    write_video(tmp_path / "videos" / "good1.mp4", numbered_frames(60)[30:], fps=10)
    (tmp_path / "videos" / "good2.mp4").unlink()
    assert compare(flags) == 1
    captured = capsys.readouterr()
    assert "32px_12f_jpeg, good1: its pixels are" in captured.out
    assert "32px_12f_raw, good2: its file cannot be read" in captured.out
    assert "4 stored videos are not what" in captured.err


@pytest.mark.skipif(not (SHARED / "hard_clips").is_dir(), reason="no hard clips beside the project")
def test_hard_clips_are_stored_right_or_named(tmp_path):
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


def test_a_report_that_cannot_be_written_is_one_line(mine, tmp_path, capsys):
    (tmp_path / "data").write_text("a file where the folder should be")
    assert check(mine) == 2
    assert "cannot write to" in capsys.readouterr().err
