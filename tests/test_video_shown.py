"""Videos as a viewer sees them: presentation time, HDR, fields, transparency; packets left out."""

import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from support.videos import SHARED, numbered_frames, write_video

from drl_jax.data.frame_form import FrameForm
from drl_jax.data.pictures import FrameConverter, tone_map
from drl_jax.data.video import (
    inspect_video,
    read_frames,
    read_timed_frames,
    sample_positions,
    sample_times,
)
from drl_jax.data.video_file import VideoError, open_video

DECODED, SHOWN = FrameForm(32), FrameForm(32, as_shown=True)
PQ, HLG, BT2020 = 16, 18, 9


def encode(path, codec, frames, fps=10, pixels="yuv420p", options=None, times=None, **settings):
    """Writes frames, av.VideoFrame or arrays, at the seconds `times` or at a constant rate."""
    with av.open(str(path), "w", **settings) as container:
        stream = container.add_stream(codec, rate=fps)
        first = frames[0]
        is_array = isinstance(first, np.ndarray)
        stream.width = first.shape[1] if is_array else first.width
        stream.height = first.shape[0] if is_array else first.height
        stream.pix_fmt, stream.options = pixels, options or {}
        unit = Fraction(1, 1000) if times else Fraction(1, fps)
        stream.time_base = stream.codec_context.time_base = unit
        for number, frame in enumerate(frames):
            if isinstance(frame, np.ndarray):
                kind = "rgba" if frame.shape[2] == 4 else "rgb24"
                frame = av.VideoFrame.from_ndarray(frame, kind)
            frame.pts = round(1000 * times[number]) if times else number
            frame.time_base = unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# ---------------------------------------------------------------- time

# Seconds at which frames begin. A screen: a picture a second, then a film; slides; slow motion.
RECORDINGS = {
    "screen": [*range(30), *(30 + n / 60 for n in range(300))],
    "slides": [5.0 * n for n in range(8)],
    "slow motion": [*(n / 240 for n in range(240)), *(1 + n / 10 for n in range(100))],
    "uneven stills": [0, 1.05, 1.95, 3.02, 3.97, 5.03],
    "a late still": [0, 0.4, 1.42, 2.5],
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_no_second_is_unseen_by_the_clock_of_time(tmp_path, name):
    times = np.array(RECORDINGS[name])
    frames = [np.full((32, 32, 3), 40 * (n % 6), np.uint8) for n in range(len(times))]
    encode(tmp_path / "v.mp4", "libx264", frames, times=times.tolist())
    with open_video(tmp_path / "v.mp4") as video:
        np.testing.assert_allclose(video.times, times, atol=1e-3)
        end = video.duration
    _, sampled = read_timed_frames(tmp_path / "v.mp4", 99, DECODED, clock="time")
    assert (np.diff(sampled) > 0).all()
    # Seconds of which nothing that was on the screen was sampled.
    shown_until = np.append(times, end)[np.searchsorted(times, sampled + 1e-3)]
    assert (np.append(sampled[1:], end) - shown_until).max() <= 1.5
    assert np.isin(times[:-1][np.diff(times) >= 0.9].round(2), sampled.round(2)).all()
    assert inspect_video(tmp_path / "v.mp4", 12, DECODED).clocks_differ(12, None) == (
        name in ("screen", "slow motion", "a late still")
    )


@pytest.mark.parametrize("fps", [8, 24, 25, 30, 30000 / 1001])
@pytest.mark.parametrize("seconds", [0.5, 4, 10.5])
@pytest.mark.parametrize("span", [None, (1, 3), (20, 30)])
def test_clocks_agree_at_a_constant_rate(fps, seconds, span):
    count = round(seconds * fps)
    found = sample_times(np.arange(count) / fps, count / fps, 12, span)
    assert found == pytest.approx(sample_positions(count, fps, 12, span), abs=1)


def test_a_span_by_time(tmp_path):
    frames = numbered_frames(40, 32, 32)
    encode(tmp_path / "v.mp4", "libx264", frames, times=[n / 4 for n in range(40)])
    _, times = read_timed_frames(tmp_path / "v.mp4", 12, DECODED, (2.5, 5), "time")
    np.testing.assert_allclose(times, [2.5, 3.5, 4.5])
    with pytest.raises(VideoError, match=r"its span 11-12 s is outside the file \(9.8 s\)"):
        read_frames(tmp_path / "v.mp4", 12, DECODED, (11, 12), "time")


def test_frames_without_time_stamps_get_those_of_their_neighbours(tmp_path):
    """Matroska has no negative times: the first frames of such a file have none."""
    times = [n / 10 - 0.5 for n in range(40)]
    options = {"avoid_negative_ts": "disabled"}
    encode(tmp_path / "v.mkv", "libx264", numbered_frames(40), times=times, options={"bf": "0"},
           container_options=options)  # fmt: skip
    with open_video(tmp_path / "v.mkv") as video:
        np.testing.assert_allclose(video.times, np.arange(40) / 10, atol=1e-6)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("transfer", "code", "luminance"),
    # Reference white, and a grey of 26 cd/m2: ITU-R BT.2408, table 1; 100 cd/m2 and peak.
    [(PQ, 0.58, 203), (PQ, 0.38, 26), (PQ, 0.508, 100), (PQ, 1, 1e4), (HLG, 0.75, 203),
     (HLG, 0.38, 26)],
)  # fmt: skip
def test_light_of_hdr_signals(transfer, code, luminance):
    (shown,) = tone_map(np.full((1, 3), code), transfer)
    np.testing.assert_allclose(shown, shown[0], atol=1e-3)  # Grey stays grey.
    light = luminance / 203
    expected = light if light <= 0.8 else 0.8 + 0.2 * (light - 0.8) / (light - 0.6)
    assert shown[0] == pytest.approx(expected ** (1 / 2.4), rel=0.02)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_the_table_of_colours_is_exact(transfer):
    signal = np.random.default_rng(0).uniform(0, 1, (16, 16, 3)) * [1, 0.9, 0.7]
    frame = av.VideoFrame.from_ndarray((signal * 65535).astype(np.uint16), "rgb48le")
    frame.color_trc, frame.color_primaries = transfer, BT2020
    frame.time_base = Fraction(1, 10)
    expected = 255 * tone_map(signal.reshape(-1, 3), transfer).reshape(16, 16, 3)
    error = np.abs(FrameConverter(as_shown=True)(frame) - expected)
    # The largest are those of colours that a screen does not have.
    assert error.mean() < 1
    assert np.percentile(error, 98) <= 6


@pytest.mark.parametrize(
    ("transfer", "code", "grey", "white"), [(PQ, 0.58, 147, 243), (HLG, 0.75, 190, 243)]
)
def test_reference_white_is_white(tmp_path, transfer, code, grey, white):
    name = {PQ: "smpte2084", HLG: "arib-std-b67"}[transfer]
    level = np.full((64, 96, 3), int(code * 65535), np.uint16)
    frames = [av.VideoFrame.from_ndarray(level, "rgb48le") for _ in range(3)]
    parameters = f"log-level=none:colorprim=bt2020:transfer={name}:colormatrix=bt2020nc"
    encode(tmp_path / "v.mp4", "libx265", frames, pixels="yuv420p10le",
           options={"x265-params": parameters})  # fmt: skip
    for form, expected in ((DECODED, grey), (SHOWN, white)):
        assert np.abs(read_frames(tmp_path / "v.mp4", 1, form).astype(int) - expected).max() <= 3
    assert inspect_video(tmp_path / "v.mp4", 1, DECODED).changed == ("HDR",)


def moving_box(number: int) -> np.ndarray:
    """Two fields of different times: a box that moves."""
    picture = np.zeros((64, 64, 3), np.uint8)
    for field in (0, 1):
        left = (number * 2 + field) * 8 % 64
        picture[field::2, left : left + 24] = 255
    return picture


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("v.mpg", "mpeg2video", {"flags": "+ilme+ildct", "top": "1"}),
        ("v.ts", "libx264", {"flags": "+ilme+ildct", "x264-params": "interlaced=1:tff=1"}),
    ],
)
def test_fields_become_whole_pictures(tmp_path, name, codec, options):
    path = tmp_path / name
    encode(path, codec, [moving_box(n) for n in range(50)], fps=25, options=options)
    combed, whole = (read_frames(path, 12, FrameForm(64, as_shown=shown)) for shown in (0, 1))
    rows = [np.abs(np.diff(frames.astype(int), axis=1)).mean() for frames in (combed, whole)]
    assert combed.shape == whole.shape == (2, 64, 64, 3)
    assert rows[0] > 30
    assert rows[1] < 8
    assert inspect_video(path, 1, DECODED).changed == ("interlaced",)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [("v.mov", "qtrle", "argb"), ("v.webm", "libvpx-vp9", "yuva420p")],
)
def test_what_is_transparent_is_on_white(tmp_path, name, codec, pixels):
    shown = []
    for hidden in (0, 255):
        picture = np.full((64, 64, 4), hidden, np.uint8)
        picture[..., 3] = 0
        picture[16:48, 16:48] = (255, 0, 0, 255)
        encode(tmp_path / name, codec, [picture] * 10, pixels=pixels)
        shown.append(read_frames(tmp_path / name, 12, FrameForm(64, as_shown=True))[0].astype(int))
        assert inspect_video(tmp_path / name, 1, DECODED).changed == ("transparent",)
    assert np.abs(shown[0][:8] - 255).max() <= 2
    assert np.abs(shown[1][28:36, 28:36] - [255, 0, 0]).max() <= 4
    assert np.abs(shown[0] - shown[1])[20:44, 20:44].max() <= 4


# ---------------------------------------------------------------- packets that are left out

CODECS = {
    "b-frames.mp4": ("libx264", {"bf": "3", "g": "20"}),
    "open groups.mp4": ("libx264", {"bf": "2", "g": "12", "x264-params": "open-gop=1"}),
    "b-pyramid.mkv": ("libx264", {"bf": "4", "x264-params": "b-pyramid=normal:ref=4"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:open-gop=1:keyint=15"}),
    "mpeg2.mpg": ("mpeg2video", {"bf": "2", "g": "9"}),
    "vp9.webm": ("libvpx-vp9", {"g": "15"}),
    "b-frames.avi": ("mpeg4", {"bf": "2"}),
    # Its key frames refresh a column at a time.
    "refresh.mp4": ("libx264", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
}


def check_reads(path, rng, cuts):
    """Frames that are read alone equal those of decoding everything, for random choices."""
    with open_video(path) as video:
        everything = list(video.timed_frames())
        for _ in range(cuts):
            stride = int(rng.integers(1, max(2, len(everything) // 2)))
            wanted = list(range(int(rng.integers(0, stride)), len(everything), stride))[:12]
            frames, times = video.read(wanted, lambda frame: frame.to_ndarray(format="rgb24"))
            assert times == [everything[number][1] for number in wanted]
            for number, frame in zip(wanted, frames, strict=True):
                expected = everything[number][0].to_ndarray(format="rgb24")
                np.testing.assert_array_equal(frame, expected, f"{path.name} {number} of {wanted}")
        return video.is_certain


@pytest.mark.parametrize("name", CODECS)
def test_frames_that_are_read_alone(tmp_path, name):
    codec, options = CODECS[name]
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 255, (8, 48, 64, 3), np.uint8)
    frames = [np.roll(noise[n // 9 % 8], 2 * n, axis=1) for n in range(60)]
    encode(tmp_path / name, codec, frames, options=options)
    assert check_reads(tmp_path / name, rng, 8) == (not name.endswith(".avi"))


HARD_CLIPS = sorted((SHARED / "hard_clips").glob("*.*")) if SHARED.is_dir() else []


@pytest.mark.skipif(not HARD_CLIPS, reason="no hard clips beside the project")
def test_frames_of_hard_clips_that_are_read_alone():
    rng = np.random.default_rng(2)
    certain = set()
    for path in HARD_CLIPS:
        # Ten minutes, and what is no video.
        if path.stat().st_size < 150_000 and path.suffix != ".txt":
            try:
                if check_reads(path, rng, 2):
                    certain.add(path.name)
            except VideoError:
                continue
    assert {"hevc_10bit.mp4", "vp9.webm", "vfr.mp4", "rotated_90.mp4"} <= certain


@pytest.mark.parametrize("stride", [2, 7, 11])
def test_pictures_of_a_damaged_file_have_their_own_times(tmp_path, stride):
    write_video(tmp_path / "v.mp4", numbered_frames(60, 96, 96), fps=10, bf="2", g="20")
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    with av.open(str(tmp_path / "v.mp4")) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for position, size in places[20:30]:
        content[position + 4 : position + size] = bytes(size - 4)
    (tmp_path / "v.mp4").write_bytes(content)
    with open_video(tmp_path / "v.mp4") as video:
        frames, times = video.read(range(0, 60, stride), FrameConverter(False))
    levels = np.array([frame.mean() for frame in frames])
    whole = (np.array(times) < 1.9) | (np.array(times) > 4.1)
    assert whole.sum() >= 36 // stride
    np.testing.assert_allclose(levels[whole], 40 * np.array(times)[whole], atol=2)


# ---------------------------------------------------------------- files that people bring

MAKE_VIDEOS = SHARED / "cases" / "make_videos.py"
# The colour of each second; slides show one for five seconds, a still one for 20.
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]
COLOURS += [(255, 255, 255), (128, 128, 128)]
SECOND_OF = {
    "slides.mp4": lambda time: round(time / 5),
    **dict.fromkeys(["vfr_still.mkv", "vfr_still.mp4"], lambda time: 0 if time < 21 else 2),
    "negative.mp4": lambda time: int(time) + 2,  # An edit list leaves out two seconds.
    "slowmo.mp4": lambda time: 0 if time < 1 else 1 + int((time - 0.95) // 10),
}
ONE_COLOUR = {"hdr_pq_white.mp4": (243,) * 3, "hdr_hlg_white.mp4": (245,) * 3}
ONE_COLOUR |= dict.fromkeys(["alpha_black.mov", "alpha_white.mov", "alpha_vp9.webm"], (255,) * 3)
GREY = {"gray16.mkv", "mono_gray.mkv"}
INTERLACED = {"interlaced.mpg", "interlaced.ts"}
NO_VIDEOS = {
    **dict.fromkeys(["concat.mp4", "playlist.mp4", "really_html.mp4"], "its content is text"),
    **dict.fromkeys(["really_a_jpeg.mp4", "really_a_png.avi"], "its format is none of"),
    "zero.mp4": "Invalid data",
}


@pytest.mark.skipif(not MAKE_VIDEOS.is_file(), reason="no generator beside the project")
def test_files_that_people_bring(tmp_path):
    """Each has its colours and times, or one line."""
    subprocess.run([sys.executable, MAKE_VIDEOS, tmp_path], check=True, capture_output=True)
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    assert len(files) > 35
    form = FrameForm(64, as_shown=True)
    for path in files:
        name = path.name
        if name in NO_VIDEOS:
            with pytest.raises(VideoError, match=NO_VIDEOS[name]):
                read_frames(path, 12, form, clock="time")
            continue
        frames, times = read_timed_frames(path, 12, form, clock="time")
        assert times[0] == 0, name
        assert (np.diff(times) > 0.5).all(), name
        for time, frame in zip(times, frames, strict=True):
            colour = np.median(frame[48:, 48:] if name in ONE_COLOUR else frame[20:], axis=(0, 1))
            second = SECOND_OF.get(name, lambda time: int(time + 0.05))(time)
            expected = np.array(ONE_COLOUR.get(name, COLOURS[second % 8]))
            if name in GREY:
                expected = expected @ [0.299, 0.587, 0.114]
            if name in INTERLACED:
                rows = np.abs(np.diff(frame.astype(int), axis=0)).mean()
                assert rows < 8, name
            else:
                assert np.abs(colour - expected).max() < 24, (name, time, colour, expected)
