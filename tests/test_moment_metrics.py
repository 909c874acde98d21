"""Metrics of moments against cases computed by hand, and films against the clips in them."""

import csv
import itertools

import numpy as np
import pytest

from benchmarks import hours
from benchmarks import moment_metrics as metrics
from benchmarks.hours import Clip, read_all, read_clips, write_files, write_hour, write_joined
from data_prep.shapes.draw import write_mp4
from drl_jax.runtime.errors import UserError

FPS = 4


def moments(*rows):
    return np.array(rows, float)


def test_overlaps_are_intersections_over_unions():
    found = moments((0, 0, 10), (0, 5, 7), (1, 0, 10))
    true = moments((0, 0, 10), (0, 5, 15), (0, 20, 30))
    expected = [[1, 5 / 15, 0], [2 / 10, 2 / 10, 0], [0, 0, 0]]
    np.testing.assert_allclose(metrics.overlaps(found, true), expected)


def test_recall_counts_the_first_moments_and_any_true_one():
    overlap = np.array([[0.1, 0.29], [0.0, 0.5], [0.9, 0.0]])
    assert not metrics.recall(overlap, 1, 0.3)
    assert metrics.recall(overlap, 5, 0.5)
    assert metrics.recall(overlap, 2, 0.5)
    assert not metrics.recall(overlap, 2, 0.7)


def test_average_precision_of_a_hand_computed_case():
    # Right, wrong (the true one is taken), wrong, right: precisions 1, 1/2, 1/3, 2/4, of 3 true.
    overlap = np.array([[0.8, 0, 0], [0.9, 0, 0], [0.1, 0.4, 0], [0, 0.6, 0]])
    assert metrics.average_precision(overlap, 0.5) == pytest.approx((1 + 1 / 2) / 3)
    # At 0.7 only the first is right; at 0.85 only the second.
    assert metrics.average_precision(overlap, 0.7) == pytest.approx(1 / 3)
    assert metrics.average_precision(overlap, 0.85) == pytest.approx((1 / 2) / 3)
    assert metrics.average_precision(overlap, 0.95) == 0
    # 0.5 to 0.6: 1/2; 0.65 to 0.8: 1/3; 0.85 and 0.9: 1/6.
    assert metrics.mean_average_precision(overlap) == pytest.approx(
        (3 * 1 / 2 + 4 * 1 / 3 + 2 * 1 / 6) / 10
    )


def test_average_precision_interpolates():
    # Wrong, right, right: precisions 0, 1/2, 2/3. The best from the second on is 2/3.
    overlap = np.array([[0.0, 0], [1, 0], [0, 1]])
    assert metrics.average_precision(overlap, 0.5) == pytest.approx(2 / 3)


def test_a_moment_takes_the_free_true_one_that_it_overlaps_most():
    overlap = np.array([[0.7, 0.6], [0.8, 0.55]])
    assert metrics.average_precision(overlap, 0.5) == 1
    # The second overlaps its remaining one by too little.
    assert metrics.average_precision(overlap, 0.58) == pytest.approx(1 / 2)


def test_average_precision_counts_ten_moments():
    overlap = np.zeros((11, 1))
    overlap[10] = 1
    assert metrics.average_precision(overlap, 0.5) == 0
    assert metrics.average_precision(overlap[1:], 0.5) == pytest.approx(1 / 10)


def test_the_centre_and_the_film_of_the_best_moment():
    true = moments((0, 0, 4), (0, 10, 14), (1, 50, 60))
    assert metrics.centre_error(moments((0, 9, 13), (0, 0, 4)), true) == 1
    assert metrics.is_inside(moments((0, 9, 13)), true)
    assert metrics.centre_error(moments((0, 4, 10)), true) == 5
    assert not metrics.is_inside(moments((0, 4, 10)), true)
    assert metrics.centre_error(moments((2, 0, 4)), true) == np.inf
    assert not metrics.is_inside(moments((2, 0, 4)), true)


def test_summary_is_in_percent_over_queries():
    true = [moments((0, 0, 10)), moments((0, 20, 30)), moments((1, 0, 10))]
    found = [moments((0, 0, 10)), moments((0, 24, 30), (0, 20, 30)), moments((0, 0, 10))]
    row = metrics.summary(found, true)
    assert [row[f"R1@{iou}"] for iou in (0.3, 0.5, 0.7)] == [66.7, 66.7, 33.3]
    assert [row[f"R5@{iou}"] for iou in (0.3, 0.5, 0.7)] == [66.7, 66.7, 66.7]
    # The second has an IoU of 0.6, then of 1: AP 1 up to 0.6, above it 1/2.
    assert row["mAP"] == pytest.approx(100 * (1 + (3 * 1 + 7 / 2) / 10 + 0) / 3, abs=0.05)
    assert (row["inside"], row["centre_s"]) == (66.7, 2)


def plain_clips(count, length=13, size=64):
    """Clips of one colour each, which differ much; x264 is not deterministic for tiny pictures."""
    colours = np.random.default_rng(1).permutation(
        np.mgrid[20:240:70, 20:240:70, 20:240:70].T.reshape(-1, 3)
    )
    return [
        Clip(None, f"clip {n}", np.full((length, size, size, 3), colours[n], np.uint8))
        for n in range(count)
    ]


def shown(film, part, clips):
    """Levels by which the frames of a part differ from its clip, on average over the picture."""
    frames = film[round(part.start * FPS) : round(part.end * FPS)].astype(int)
    return np.abs(frames - clips[part.clip].frames).mean((1, 2, 3))


@pytest.mark.parametrize("fades", [False, True])
def test_a_film_shows_each_clip_at_its_time(fades, tmp_path):
    clips = plain_clips(6)
    path = tmp_path / "film.mp4"
    parts = write_hour(path, clips, FPS, 60, 0, fades=fades)
    film = read_all(path)
    assert 50 * FPS < len(film) <= 60 * FPS
    assert sorted(part.clip for part in parts[:6]) == list(range(6))
    for earlier, later in itertools.pairwise(parts):
        gap = later.start - earlier.end
        assert (0.5 <= gap <= 3) if fades else (0 <= gap <= 2)
    for part in parts:
        assert shown(film, part, clips).max() < 6
        # The frames beside it show something else.
        first, last = round(part.start * FPS), round(part.end * FPS)
        beside = [film[row] for row in (first - 1, last) if 0 <= row < len(film)]
        assert all(np.abs(film[first].astype(int) - frame).mean() > 6 for frame in beside)


def test_a_cross_fade_mixes_the_shots_beside_it(tmp_path):
    clips = plain_clips(2)
    parts = write_hour(tmp_path / "film.mp4", clips, FPS, 20, 1, fades=True)
    film = read_all(tmp_path / "film.mp4").astype(int)
    first = round(parts[1].start * FPS)
    before, after = film[first - 3], film[first]
    for frame, share in ((film[first - 2], 1 / 3), (film[first - 1], 2 / 3)):
        assert np.abs(frame - (1 - share) * before - share * after).max() < 8


def test_films_depend_on_the_seed_alone(tmp_path):
    clips = plain_clips(4)
    parts = [write_hour(tmp_path / f"{n}.mp4", clips, FPS, 30, n // 2) for n in range(4)]
    files = [(tmp_path / f"{n}.mp4").read_bytes() for n in range(4)]
    assert (parts[0], files[0]) == (parts[1], files[1])
    assert parts[1] != parts[2]
    assert files[1] != files[2]


def test_a_joined_film_has_no_gaps(tmp_path):
    clips = plain_clips(3)
    parts = write_joined(tmp_path / "film.mp4", clips, FPS, None)
    film = read_all(tmp_path / "film.mp4")
    assert [(part.clip, part.start, part.end) for part in parts] == [
        (0, 0, 3.25),
        (1, 3.25, 6.5),
        (2, 6.5, 9.75),
    ]
    assert len(film) == 39
    assert max(shown(film, part, clips).max() for part in parts) < 6
    mixed = write_joined(tmp_path / "mixed.mp4", clips, FPS, 0)
    assert sorted(part.clip for part in mixed) == [0, 1, 2]
    assert [part.clip for part in mixed] != [0, 1, 2]
    film = read_all(tmp_path / "mixed.mp4")
    assert max(shown(film, part, clips).max() for part in mixed) < 6


def test_files_of_any_rate_and_size_are_joined_in_time(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for clip in plain_clips(2, length=8):
        hours.write_h264(
            folder / f"{clip.caption}.mp4", clip.frames, 4 if "0" in clip.caption else 8
        )
    (folder / "broken.mp4").write_bytes(b"not a video")
    used, parts = write_files(tmp_path / "film.mp4", folder)
    assert [file.name for file in used] == ["clip 0.mp4", "clip 1.mp4"]
    assert [(part.clip, part.start, part.end) for part in parts] == [(0, 0, 2), (1, 2, 3)]
    assert read_all(tmp_path / "film.mp4").shape == (75, 256, 256, 3)


def test_clips_are_read_with_their_captions(tmp_path):
    videos = tmp_path / "videos" / "test"
    with pytest.raises(UserError, match="README's first command"):
        read_clips(videos)
    videos.mkdir(parents=True)
    frames = list(plain_clips(1)[0].frames)
    write_mp4(videos / "video7.mp4", frames)
    with (tmp_path / "SHAPES_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video_id", "sentence"), ("video7", "a , b")])
    clips, fps = read_clips(videos)
    assert fps == FPS
    assert [(clip.path.name, clip.caption) for clip in clips] == [("video7.mp4", "a , b")]
    assert clips[0].frames.shape == (13, 64, 64, 3)
    (videos / "video7.mp4").unlink()
    with pytest.raises(UserError, match=r"no clip .*video7\.mp4"):
        read_clips(videos)
