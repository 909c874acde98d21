"""Films are sampled by the time at which a viewer sees the frames, shot by shot."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from support.videos import write_video

from drl_jax.data.frame_form import FrameForm
from drl_jax.data.long_video import SampledVideo, sample_video
from drl_jax.data.video import read_frames
from drl_jax.data.video_file import OpenVideo, open_video

FORM = FrameForm(64)
FPS = 12


def scene(number: int, seconds: float, fps: int = FPS) -> np.ndarray:
    """Two squares that move over a background of their own colours."""
    rng = np.random.default_rng(number)
    background = rng.integers(0, 120, (4, 4, 3)).repeat(16, 0).repeat(16, 1)
    frames = np.tile(background, (round(seconds * fps), 1, 1, 1)).astype(np.uint8)
    start, colours = rng.integers(0, 30, (2, 2)), rng.integers(100, 256, (2, 3))
    for step, frame in enumerate(frames):
        for (y, x), colour in zip(start + 2 * step // fps, colours, strict=True):
            frame[y : y + 16, x : x + 16] = colour
    return frames


def mixed(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Joins two scenes; the last frames of one are mixed with the first ones of the other."""
    share = (np.arange(1, count + 1) / (count + 1))[:, None, None, None]
    between = first[-count:] * (1 - share) + second[:count] * share
    return np.concatenate([first[:-count], between.astype(np.uint8), second[count:]])


def sample(path: Path, fps: float = 1.0) -> tuple[SampledVideo, np.ndarray]:
    frames: list[np.ndarray] = []
    with open_video(path) as opened:
        video = sample_video(opened, FORM, frames.append, fps)
    assert len(frames) == len(video.times) == len(video.coarse)
    assert (np.diff(video.times) > 0).all()
    return video, np.stack(frames).astype(int)


@pytest.mark.parametrize(("fps", "count"), [(1, 6), (2, 12), (2.5, 18), (4, 24)])
def test_more_frames_a_second_have_the_coarse_ones_among_them(tmp_path, fps, count):
    write_video(tmp_path / "film.mp4", np.concatenate([scene(0, 6), scene(1, 2)]), fps=FPS)
    one, frames = sample(tmp_path / "film.mp4")
    video, more = sample(tmp_path / "film.mp4", fps)
    np.testing.assert_allclose(one.times, [*range(6), 6, 6.667, 7.25, 7.917], atol=0.09)
    assert one.coarse.all()
    np.testing.assert_array_equal(one.times, video.times[video.coarse])
    np.testing.assert_array_equal(frames, more[video.coarse])
    # The short shot has its four frames, whatever the number of frames a second.
    assert len(video.times) == count + 4
    assert video.shots.tolist() == [0, count]


def test_a_shot_has_the_frames_of_the_shot_as_a_file(tmp_path):
    """Also one that follows a cross-fade; a shorter one has four frames, with its ends."""
    scenes = [scene(number, seconds) for number, seconds in enumerate((5, 1.5, 7, 6, 5))]
    film = np.concatenate([*scenes[:3], mixed(scenes[3], scenes[4], 6)])
    write_video(tmp_path / "film.mp4", film, fps=FPS)
    video, frames = sample(tmp_path / "film.mp4")
    np.testing.assert_allclose(video.shot_starts, [0, 5, 6.5, 13.5, 19.5], atol=1e-6)
    for number, first in enumerate(video.shots):
        shown = scenes[number][6:] if number == 4 else scenes[number]
        write_video(tmp_path / "shot.mp4", shown, fps=FPS)
        alone = read_frames(tmp_path / "shot.mp4", 100, FORM).astype(int)
        if number == 1:
            alone = scenes[1][[0, 6, 11, 17]].astype(int)
        # Two encodings of the same pictures.
        assert np.abs(frames[first : first + len(alone)] - alone).mean() < 4
    # The mixed frames are no samples: the last of the shot before is of a second earlier.
    assert video.times[video.shots[4] - 1] == pytest.approx(18.5)


def flash(film: np.ndarray) -> None:
    film[50:53] = 255


def lights(film: np.ndarray) -> None:
    film[(np.arange(len(film)) // 18) % 2 == 1] = np.clip(
        film[(np.arange(len(film)) // 18) % 2 == 1] * 1.4 + 15, 0, 255
    )


def burst(film: np.ndarray) -> None:
    """Something crosses the picture in a second, and nothing moves before and after it."""
    film[:72] = film[:1]
    for step in range(12):
        film[36 + step, 40:50, 5 * step : 5 * step + 8] = 255


@pytest.mark.parametrize("disturb", [flash, lights, burst])
def test_what_is_no_cut(tmp_path, disturb):
    film = np.concatenate([scene(0, 6), scene(1, 6), scene(2, 6)])
    disturb(film)
    write_video(tmp_path / "film.mp4", film, fps=FPS)
    assert sample(tmp_path / "film.mp4")[0].shot_starts.tolist() == [0, 6, 12]


@pytest.mark.parametrize("fps", [4, 12, 25])
@pytest.mark.parametrize("seconds", [0.5, 0.9])
def test_a_shot_begins_after_a_cross_fade(tmp_path, fps, seconds):
    count = round(seconds * fps)
    film = mixed(scene(0, 6, fps), scene(1, 6, fps), count)
    write_video(tmp_path / "film.mp4", film, fps=fps)
    video, _ = sample(tmp_path / "film.mp4")
    # Pictures are compared 15 times a second at most.
    np.testing.assert_allclose(video.shot_starts, [0, 6], atol=0.09)
    assert not ((video.times > 6 - seconds) & (video.times < 5.95)).any()


def write_timed(path: Path, times: list[float]) -> None:
    """Writes a video whose frames are of one colour a second, with their times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = 64
        stream.pix_fmt, base = "yuv420p", Fraction(1, 1000)
        stream.time_base = stream.codec_context.time_base = base
        for time in times:
            array = np.full((64, 64, 3), 40 * (int(time) % 6), np.uint8)
            frame = av.VideoFrame.from_ndarray(array, "rgb24")
            frame.pts, frame.time_base = round(1000 * time), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


RECORDINGS = {
    # A screen: a picture a second, then a film; slides; and slow motion of a phone.
    "screen": [*range(40), *(40 + n / 60 for n in range(300))],
    "slides": [5 * n for n in range(8)],
    "slow": [*(n / 30 for n in range(150)), *(5 + n / 240 for n in range(960)), *range(9, 20)],
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_time_is_that_of_the_viewer(tmp_path, name):
    """Not the number of frames: no second is unseen, and none is seen more often."""
    write_timed(tmp_path / "film.mp4", RECORDINGS[name])
    video, frames = sample(tmp_path / "film.mp4")
    assert video.duration == pytest.approx(RECORDINGS[name][-1], abs=6)
    assert np.diff([*video.times, video.duration]).max() <= 1.5
    assert len(video.times) <= 4 * video.duration
    # What is seen at a time is what is shown then.
    shown = np.array(RECORDINGS[name])
    for time, frame in zip(video.times, frames, strict=True):
        known = shown[shown <= time + 0.05][-1]
        assert abs(frame.mean() - 40 * (int(known) % 6)) < 6


def no_times(number: int) -> int | None:
    return None


def repeated(number: int) -> int:
    return number - number % 2


def joined(number: int) -> int:
    """Two recordings in one file, of which the second starts again."""
    return number % 120


def far(number: int) -> int:
    """A clock that is set forward by a day."""
    return number + (number > 100) * 24 * 3600 * FPS


@pytest.mark.parametrize("pts", [no_times, repeated, joined, far])
def test_times_that_are_wrong(tmp_path, monkeypatch, pts):
    write_video(tmp_path / "film.mp4", scene(0, 20), fps=FPS)
    expected, frames = sample(tmp_path / "film.mp4")

    decoded = OpenVideo.frames

    def with_times(video):
        for number, frame in enumerate(decoded(video)):
            frame.pts, frame.time_base = pts(number), Fraction(1, FPS)
            yield frame

    monkeypatch.setattr(OpenVideo, "frames", with_times)
    found, others = sample(tmp_path / "film.mp4")
    np.testing.assert_allclose(found.times, expected.times, atol=1e-6)
    assert found.duration == pytest.approx(20, abs=0.1)
    assert np.abs(others - frames).mean() < 3
