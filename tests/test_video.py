import errno
import hashlib
import io
import json
from pathlib import Path

import av
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
from drl_jax.data.pictures import to_form
from drl_jax.data.video import inspect_video, read_frames, sample_positions
from drl_jax.data.video_file import VideoError
from drl_jax.runtime.errors import Unavailable


@pytest.mark.parametrize(
    ("n_frames", "fps", "max_frames", "span", "expected"),
    [
        (90, 30, 12, None, [0, 30, 60]),
        (90, 29.97, 12, None, [0, 30, 60]),
        (10, 0.25, 12, None, list(range(10))),
        (0, 30, 12, None, []),
        (50, 3, 12, None, [0, 3, 6, 12, 15, 21, 24, 30, 33, 39, 42, 48]),
        (6000, 10, 3, None, [0, 2990, 5990]),
        (100, 10, 12, (2, 5), [20, 30, 40, 50]),  # The end is included.
        (100, 10, 12, (0.55, 1.2), [5]),
        (100, 10, 12, (8, 31), [80, 90]),  # The end is after the last frame.
        (100, 10, 12, (10, 12), []),
        (1000, 29.97, 12, (3, 6), [89, 119, 149, 179]),
        (1000, 10, 3, (10, 50), [100, 300, 500]),
    ],
)
def test_sample_positions(n_frames, fps, max_frames, span, expected):
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
    assert (facts.frames, facts.packets, facts.damaged_packets) == (60, 60, 0)
    assert (facts.fps, facts.duration, facts.black, facts.changed) == (10.0, 6.0, False, ())
    np.testing.assert_allclose(facts.times, np.arange(60) / 10)
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


def test_a_file_that_is_no_video_gives_a_reason(tmp_path):
    (tmp_path / "empty.mp4").touch()
    write_video(tmp_path / "whole.mp4", numbered_frames(30), fps=10)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:300])
    for name in ("empty.mp4", "cut.mp4"):
        with pytest.raises(VideoError, match=r"cannot be read as a video \(.+\)"):
            read_frames(tmp_path / name, 12, FrameForm(32))
    write_video(tmp_path / "thin.mkv", np.zeros((4, 2, 320, 3), np.uint8), fps=2)
    with pytest.raises(VideoError, match="320 x 2"):
        read_frames(tmp_path / "thin.mkv", 12, FrameForm(32))
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.mp4", "PNG")
    with pytest.raises(VideoError, match="is not a video: its format is none of mov, avi, "):
        read_frames(tmp_path / "picture.mp4", 12, FrameForm(32))
    (tmp_path / "page.mp4").write_text("\ufeff<!DOCTYPE html>\n<title>Café</title> " + "é" * 60)
    start = "is not a video: its content is text that starts with '<!DOCTYPE html> <title>Café"
    with pytest.raises(VideoError, match=start):
        read_frames(tmp_path / "page.mp4", 12, FrameForm(32))


class Member:
    """A file inside another one."""

    def __init__(self, name: str, content: bytes, error: OSError | None = None):
        self.name, self.content, self.error = name, content, error

    def open(self, mode: str = "rb") -> io.BytesIO:
        file = io.BytesIO(self.content)
        file.name, read = self.name, file.read

        def read_or_raise(size: int) -> bytes:
            content = read(size)
            if self.error is not None and len(content) < size:
                raise self.error
            return content

        file.read = read_or_raise
        return file


# Texts of playlists, which FFmpeg follows.
PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile {file}\n",
    "hls": "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{file}\n"
    "#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "asx": '<asx version="3.0"><entry><ref href="{file}"/></entry></asx>',
    "ref": "[Reference]\nRef1={file}\n",
    "sub": "{{1}}{{20}}words\n" * 9,
}


@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".asf", ".gif"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_text_that_names_a_video_is_none(kind, suffix, tmp_path, monkeypatch):
    write_video(tmp_path / "secret.ts", numbered_frames(10), fps=10)
    monkeypatch.chdir(tmp_path)
    for file in ("secret.ts", tmp_path / "secret.ts"):
        text = PLAYLISTS[kind].format(file=file)
        path = tmp_path / f"list{suffix}"
        path.write_text(text)
        for video in (path, Path(path.name), Member(path.name, text.encode())):
            with pytest.raises(VideoError, match="is not a video: its content is text"):
                read_frames(video, 4, FrameForm(32))


@pytest.mark.parametrize(
    "name",
    [
        *("concat:a.mp4|a.mp4", "cache:a.mp4", "file:a.mp4", "async:a.mp4", "crypto:a.mp4"),
        *("subfile,,start,0,end,900,,:a.mp4", "pipe:0.mp4", "fd:0.mp4", "data:x.mp4", "-.mp4"),
        *("http:x.mp4", "tcp:x.mp4", "a%03d.mp4", "*.mp4"),
    ],
)
def test_a_name_like_an_address_is_that_of_a_file(name, tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", numbered_frames(10), fps=10)
    write_video(tmp_path / name, numbered_frames(30), fps=10)
    monkeypatch.chdir(tmp_path)
    content = Path(name).read_bytes()
    for video in (Path(name), Member(name, content)):
        levels = read_frames(video, 12, FrameForm(32)).reshape(3, -1).mean(1)
        np.testing.assert_allclose(levels, [0, 40, 80], atol=2)


@pytest.mark.parametrize(
    ("suffix", "kind", "codec"),
    [
        *((".avi", "avi", "mpeg4"), (".wmv", "asf", "wmv2"), (".flv", "flv", "flv")),
        *((".m2ts", "mpegts", "mpeg2video"), (".vob", "vob", "mpeg2video")),
        *((".mpg", "mpeg", "mpeg1video"), (".mpg", "mpeg1video", "mpeg1video")),
        *((".m4v", "m4v", "mpeg4"), (".3gp", "3gp", "mpeg4"), (".webm", "webm", "libvpx")),
        *((".ogv", "ogg", "libvpx"), (".gif", "gif", "gif"), (".f4v", "f4v", "libx264")),
    ],
)
def test_formats_of_all_suffixes(suffix, kind, codec, tmp_path):
    path = tmp_path / f"v{suffix}"
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for array in numbered_frames(50, 48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    levels = read_frames(path, 12, FrameForm(32)).reshape(2, -1).mean(1)
    np.testing.assert_allclose(levels, [0, 100], atol=20)


def test_what_the_system_refuses_is_no_property_of_a_video(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(30), fps=10)
    content = (tmp_path / "a.mp4").read_bytes()
    # FFmpeg alone would take the error for the end of the file.
    for length in (100, len(content) - 100):
        broken = Member("a.mp4", content[:length], OSError(errno.EIO, "Input/output error"))
        for read in (read_frames, inspect_video):
            with pytest.raises(Unavailable, match=r"Input/output error \(EIO\)"):
                read(broken, 12, FrameForm(32))
    with pytest.raises(
        Unavailable, match=r"absent\.mp4 cannot be read: No such file .* \(ENOENT\)$"
    ):
        read_frames(tmp_path / "absent.mp4", 12, FrameForm(32))


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
