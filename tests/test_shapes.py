"""The drawn datasets: clips that make a fair test of temporal order, and stills."""

import errno
import itertools
import random
import shutil

import av
import numpy as np
import pytest

from data_prep.shapes import stills
from data_prep.shapes.draw import FRAMES, SIZE, draw_clip, draw_still, write_mp4
from data_prep.shapes.drawn_builder import draw_files
from data_prep.shapes.scenes import (
    REVERSED,
    SIZES,
    SYMMETRIC,
    MovingShape,
    Scene,
    all_scenes,
    captions,
    split_scenes,
)
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.video import read_frames
from drl_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def splits():
    return split_scenes(*SIZES["full"], seed=0)


def test_no_scene_or_its_reverse_is_in_two_splits(splits):
    def with_reverses(scenes):
        return {s for scene in scenes for s in (scene, scene.reversed())}

    train, val, test = (with_reverses(splits[0][name]) for name in ("train", "val", "test"))
    assert not train & val
    assert not train & test
    assert not val & test
    test_scenes = splits[0]["test"]
    assert len(set(test_scenes)) == len(test_scenes) == 512


def test_half_of_the_clips_are_pairs_of_one_reversed_motion(splits):
    for split in ("val", "test"):
        scenes, pairs = (part[split] for part in splits)
        assert len(pairs) == len(scenes) // 4
        for one, other in pairs:
            a, b = scenes[one], scenes[other]
            assert a.reversed() == b
            assert len({a.first, a.second} - {b.first, b.second}) == 1


def test_every_moving_shape_occurs_in_training(splits):
    every, seen = (
        {shape for scene in scenes for shape in (scene.first, scene.second)}
        for scenes in (all_scenes(), splits[0]["train"])
    )
    assert seen == every


def test_captions_of_a_scene_are_distinct_and_fit_no_other():
    assert len(set(captions(all_scenes()[0], 20, random.Random(0)))) == 20
    scene_of = {}
    for scene in all_scenes():
        for caption in captions(scene, 3, random.Random(0)):
            assert scene_of.setdefault(caption, scene) == scene


def drawn(motion, seed):
    scene = Scene.of(MovingShape("blue", "cross", motion), MovingShape("red", "circle", "still"))
    return draw_clip(scene, seed), draw_clip(scene.reversed(), seed)


def test_a_reversed_scene_has_the_same_frames_in_reverse_order():
    for motion in REVERSED:
        forward, backward = drawn(motion, 7)
        assert len(forward) == FRAMES
        np.testing.assert_array_equal(forward, backward[::-1])
        assert not np.array_equal(forward, backward)
    for motion in SYMMETRIC:
        frames = np.array(drawn(motion, 3)[0]).astype(int)
        assert np.abs(frames - frames[::-1]).max() <= 2  # Rounding of supersampled edges.


def test_motions_have_the_direction_of_their_name():
    def centre(frame):
        blue = frame[..., 2].astype(int) > 180
        return np.argwhere(blue).mean(0)

    for motion, axis, sign in (("right", 1, 1), ("left", 1, -1), ("up", 0, -1), ("down", 0, 1)):
        frames, _ = drawn(motion, 1)
        moved = centre(frames[-1]) - centre(frames[0])
        assert moved[axis] * sign > 15, motion
        assert abs(moved[1 - axis]) < 3, motion


def test_no_still_is_in_two_splits_and_its_first_caption_fits_no_other():
    splits = stills.split_stills(*stills.SIZES["full"], seed=0)
    drawn = [still for split in splits.values() for still in split]
    assert len(set(drawn)) == len(drawn) == sum(stills.SIZES["full"])
    assert len(splits["test"]) == 512
    still_of = {}
    for still in drawn:
        (caption,) = stills.captions(still, 1, random.Random(0))
        assert still_of.setdefault(caption, still) == still


def test_other_captions_of_a_still_leave_things_out():
    small = stills.PlacedShape("blue", "cross", "small", "top", "left")
    still = stills.Still(small, stills.PlacedShape("red", "circle", "big", "middle", "right"))
    captions = stills.captions(still, 40, random.Random(0))
    assert len(set(captions)) == 40
    with_size = {("small" in caption or "little" in caption) for caption in captions}
    with_place = {"top left" in caption for caption in captions}
    assert with_size == with_place == {True, False}
    assert all("blue" in caption and "red" in caption for caption in captions)


def test_a_shape_of_a_still_is_where_its_caption_says():
    radii = {"small": (5, 6.5), "medium": (8, 10), "big": (12, 14)}
    for size, row, column in itertools.product(stills.STILL_SIZES, stills.ROWS, stills.COLUMNS):
        placed = stills.PlacedShape("blue", "cross", size, row, column)
        elsewhere = ("top" if row != "top" else "bottom", column)
        other = stills.PlacedShape("red", "circle", "small", *elsewhere)
        (frame,) = draw_still(stills.Still(*sorted((placed, other))), 3)
        blue = frame[..., 2].astype(int) > 180
        y, x = np.argwhere(blue).mean(0)
        assert int(3 * y / SIZE) == stills.ROWS.index(row)
        assert int(3 * x / SIZE) == stills.COLUMNS.index(column)
        # The bars of a cross are a third as wide as they are long.
        low, high = radii[size]
        assert low - 0.7 < np.sqrt(blue.sum() * 9 / 20) < high + 0.7


def test_files_are_h264_and_keep_reversed_clips_equal(tmp_path):
    scene = Scene.of(MovingShape("blue", "cross", "left"), MovingShape("red", "circle", "swing"))
    write_mp4(tmp_path / "a.mp4", draw_clip(scene, 5))
    write_mp4(tmp_path / "b.mp4", draw_clip(scene.reversed(), 5))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].frames == FRAMES
    a, b = (read_frames(tmp_path / name, 12, FrameForm(64)) for name in ("a.mp4", "b.mp4"))
    np.testing.assert_array_equal(a, b[::-1])
    write_mp4(tmp_path / "again.mp4", draw_clip(scene, 5))
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()


def one_frame(item, seed):
    """A frame of one level, drawn by worker processes."""
    return [np.full((SIZE, SIZE, 3), 100 * item, np.uint8)]


def test_only_videos_of_the_same_drawing_are_kept(tmp_path, monkeypatch):
    def draw(members):
        splits = {"train": members, "val": [], "test": []}
        draw_files(tmp_path, splits, draw=one_frame, caption=lambda item: [f"caption {item}"])
        return [path.stat().st_mtime_ns for path in sorted((tmp_path / "videos").rglob("*.mp4"))]

    def rmtree(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    first = draw([0])
    assert draw([0]) == first
    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(UserError, match=r"another version in .*videos: Permission denied"):
            draw([1, None])
    with pytest.raises(UserError, match=r"cannot draw .*/train/video1.mp4: TypeError: unsupported"):
        draw([1, None])  # Removes the first one, and draws others.
    (frame,) = read_frames(tmp_path / "videos" / "train" / "video0.mp4", 1, FrameForm(SIZE))
    assert abs(int(frame.mean()) - 100) <= 2
