import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.videos import (
    HARD,
    SHARED,
    numbered_frames,
    write_video,
    write_video_of_unknown_codec,
    write_video_with_latin_title,
)

from drl_jax.data.frame_form import FrameForm
from drl_jax.data.video import (
    VideoError,
    VideoFacts,
    inspect_video,
    read_frames,
    sample_positions,
    to_form,
)


@pytest.mark.parametrize(
    ("n_frames", "fps", "max_frames", "expected"),
    [
        (90, 30, 12, [0, 30, 60]),
        (90, 29.97, 12, [0, 30, 60]),
        (10, 0.25, 12, list(range(10))),
        (1, 30, 12, [0]),
        (0, 30, 12, []),
        (50, 3, 12, [0, 3, 6, 12, 15, 21, 24, 30, 33, 39, 42, 48]),
        (6000, 10, 3, [0, 2990, 5990]),
    ],
)
def test_sample_positions(n_frames, fps, max_frames, expected):
    assert sample_positions(n_frames, fps, max_frames) == expected


@pytest.mark.parametrize(
    ("n_frames", "fps", "max_frames", "span", "expected"),
    [
        (100, 10, 12, (2, 5), [20, 30, 40, 50]),  # The end is included.
        (100, 10, 12, (0.55, 1.2), [5]),
        (100, 10, 12, (8, 31), [80, 90]),  # The end is after the last frame.
        (100, 10, 12, (10, 12), []),
        (1000, 29.97, 12, (3, 6), [89, 119, 149, 179]),
        (1000, 10, 3, (10, 50), [100, 300, 500]),
    ],
)
def test_sample_positions_of_a_span(n_frames, fps, max_frames, span, expected):
    assert sample_positions(n_frames, fps, max_frames, span) == expected


def test_one_frame_per_second_is_read_in_order(tmp_path):
    write_video(tmp_path / "v.mp4", numbered_frames(41), fps=10)
    frames = read_frames(tmp_path / "v.mp4", max_frames=12, form=FrameForm(32))
    assert frames.shape == (5, 32, 32, 3)
    assert frames.dtype == np.uint8
    levels = frames.reshape(5, -1).mean(1)
    np.testing.assert_allclose(levels, [0, 40, 80, 120, 160], atol=2)


def test_a_span_of_a_video(tmp_path):
    write_video(tmp_path / "v.mp4", numbered_frames(60), fps=10)
    frames = read_frames(tmp_path / "v.mp4", max_frames=12, form=FrameForm(32), span=(2, 4))
    np.testing.assert_allclose(frames.reshape(3, -1).mean(1), [80, 120, 160], atol=2)
    with pytest.raises(VideoError, match=r"its span 7-9 s is outside the file \(6.0 s\)"):
        read_frames(tmp_path / "v.mp4", max_frames=12, form=FrameForm(32), span=(7, 9))


def test_inspect_video(tmp_path):
    write_video(tmp_path / "v.mp4", numbered_frames(60), fps=10)
    facts = inspect_video(tmp_path / "v.mp4", 12, FrameForm(32))
    assert facts == VideoFacts(60, 0, 10.0, 6.0, variable_rate=False, black=False)
    write_video(tmp_path / "black.mp4", np.zeros((20, 32, 48, 3), np.uint8), fps=10)
    assert inspect_video(tmp_path / "black.mp4", 12, FrameForm(32)).black


def test_bframes_are_counted_in_display_order(tmp_path):
    write_video(tmp_path / "v.mp4", numbered_frames(41), fps=10, bf="3")
    frames = read_frames(tmp_path / "v.mp4", max_frames=3, form=FrameForm(32))
    np.testing.assert_allclose(frames.reshape(3, -1).mean(1), [0, 80, 160], atol=2)


def test_the_default_form_is_pil_bicubic_and_central():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    found = to_form(image, FrameForm(20))
    expected = (
        Image.fromarray(image).resize((30, 20), Image.Resampling.BICUBIC).crop((5, 0, 25, 20))
    )
    np.testing.assert_array_equal(found, np.asarray(expected))
    assert to_form(image.transpose(1, 0, 2), FrameForm(20)).shape == (20, 20, 3)


def test_a_picture_of_the_right_size_is_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    np.testing.assert_array_equal(to_form(image, FrameForm(20)), image)


def test_a_file_that_is_no_video_gives_a_reason(tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").touch()
    write_video(tmp_path / "whole.mp4", numbered_frames(30), fps=10)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:300])
    for name in ("text.mp4", "empty.mp4", "cut.mp4", "absent.mp4"):
        with pytest.raises(VideoError, match=r"cannot be read as a video \(.+\)"):
            read_frames(tmp_path / name, 12, FrameForm(32))
    write_video(tmp_path / "thin.mkv", np.zeros((4, 2, 320, 3), np.uint8), fps=2)
    with pytest.raises(VideoError, match="320 x 2"):
        read_frames(tmp_path / "thin.mkv", 12, FrameForm(32))


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv", ".mov"])
def test_a_title_in_latin_1_does_not_matter(suffix, tmp_path):
    path = tmp_path / f"v{suffix}"
    write_video_with_latin_title(path, numbered_frames(30), fps=10)
    assert b"Caf\xe9" in path.read_bytes()
    levels = read_frames(path, max_frames=12, form=FrameForm(32)).reshape(3, -1).mean(1)
    np.testing.assert_allclose(levels, [0, 40, 80], atol=2)
    assert inspect_video(path, 12, FrameForm(32)).frames == 30


def test_an_unknown_codec_gives_a_reason(tmp_path):
    write_video_of_unknown_codec(tmp_path / "v.mp4", numbered_frames(30), fps=10)
    for read in (read_frames, inspect_video):
        with pytest.raises(VideoError, match="has a video codec that FFmpeg cannot decode"):
            read(tmp_path / "v.mp4", 12, FrameForm(32))


def test_changed_bytes_give_frames_or_a_reason(tmp_path):
    rng = np.random.default_rng(0)
    outcomes = set()
    for suffix in (".mp4", ".avi", ".mkv"):
        write_video(tmp_path / f"whole{suffix}", numbered_frames(20), fps=10, title="A title")
        content = (tmp_path / f"whole{suffix}").read_bytes()
        # The header of an mp4 file is at its end.
        first = content.rfind(b"moov") if suffix == ".mp4" else 0
        last = min(len(content), first + 2000)
        for _ in range(60):
            changed = bytearray(content)
            for position in rng.integers(first, last, 3):
                changed[position] = rng.integers(256)
            (tmp_path / f"changed{suffix}").write_bytes(changed)
            try:
                frames = read_frames(tmp_path / f"changed{suffix}", 4, FrameForm(32))
                outcomes.add(frames.shape[1:])
            except VideoError as error:
                outcomes.add(len(str(error).splitlines()))
    assert outcomes == {(32, 32, 3), 1}


@pytest.mark.skipif(not (SHARED / "hard_clips").is_dir(), reason="no hard clips beside the project")
@pytest.mark.parametrize("name", sorted(HARD))
def test_hard_clips(name):
    expected = HARD[name]
    if isinstance(expected, str):
        with pytest.raises(VideoError, match=expected):
            read_frames(SHARED / "hard_clips" / name, 12, FrameForm(224))
    else:
        frames = read_frames(SHARED / "hard_clips" / name, 12, FrameForm(224))
        assert frames.shape == (expected, 224, 224, 3)
        assert frames.reshape(expected, -1).std(1).min() > 1  # No black frame.


# Files that decord reads differently: it repeats a frame that does not exist, and converts 10-bit
# pictures and odd heights in another way.
UNLIKE_DECORD = {"stream-of-water.webm", "hevc_10bit.mp4", "odd_h91_420.avi"}
DECORD = json.loads((Path(__file__).parent / "golden" / "decord.json").read_text())


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="no real clips beside the project")
@pytest.mark.parametrize("name", sorted(DECORD))
def test_pixels_equal_those_of_decord(name):
    frames = read_frames(SHARED / name, 12, FrameForm(224))
    same = hashlib.sha256(frames.tobytes()).hexdigest() == DECORD[name]["sha256"]
    assert same == (Path(name).name not in UNLIKE_DECORD)
    if same:
        assert len(frames) == len(DECORD[name]["positions"])
