"""Clips for the page: copied where only the container is none that browsers play, else encoded."""

from pathlib import Path

import av
import numpy as np
import pytest

from drl_jax.search.clips import write_clip

RATE, SECONDS, GROUP = 10, 8, 30  # Frames a second; frames from key frame to key frame.
SOUND_RATE = 44_100
FIRST = 50  # Grey level.


def write_film(
    path: Path, *, sound: str = "aac", pixels: str = "yuv420p", rate: int = RATE, **options: str
) -> None:
    """Writes H.264 with B-frames; the mean of frame n is FIRST + n."""
    with av.open(str(path), "w") as container:
        options = {"g": str(GROUP), "sc_threshold": "0", "bf": "2", **options}
        video = container.add_stream("libx264", rate=rate, options=options)
        video.width, video.height, video.pix_fmt = 64, 48, pixels
        audio = container.add_stream(sound, rate=SOUND_RATE) if sound else None
        for number in range(RATE * SECONDS):
            noise = np.random.default_rng(number).integers(-40, 41, (48, 64, 1))
            picture = (FIRST + number + np.tile(noise, 3)).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(video.encode())
        if audio is not None:
            tone = 8000 * np.sin(np.arange(SOUND_RATE * SECONDS) / 20)
            for start in range(0, len(tone), 1152):
                samples = tone[None, start : start + 1152].astype(np.int16)
                frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
                frame.sample_rate, frame.pts = SOUND_RATE, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode())


def levels(path: Path) -> list[tuple[float, float]]:
    """Time and level of each frame that a player shows."""
    with av.open(str(path)) as container:
        first = float(container.streams.video[0].start_time * container.streams.video[0].time_base)
        return [
            (frame.time - first, float(frame.to_ndarray(format="rgb24").mean()))
            for frame in container.decode(video=0)
        ]


def coded(path: Path) -> set[bytes]:
    """The ends of the packets of the pictures; their starts depend on the container."""
    with av.open(str(path)) as container:
        return {bytes(packet)[-40:] for packet in container.demux(video=0) if packet.size}


@pytest.mark.parametrize("start", [0.0, 4.25])
@pytest.mark.parametrize(
    ("name", "is_copied", "options"),
    [
        ("matroska.mkv", True, {}),
        ("mute.mkv", True, {"sound": ""}),
        ("stream.ts", True, {}),
        ("flash.flv", True, {"sound": "libmp3lame"}),
        ("one key frame.mkv", True, {"g": "1000"}),
        # What an mp4 file lacks for a browser is more than another container.
        ("plain.mp4", False, {}),
        ("surround.mkv", False, {"sound": "ac3"}),
        ("ten bits.mkv", False, {"pixels": "yuv420p10le"}),
        # Its times of presentation are wrong.
        ("b-frames.avi", False, {"sound": "libmp3lame"}),
    ],
)
def test_a_clip_is_copied_or_encoded(tmp_path, name, is_copied, options, start):
    film, clip = tmp_path / name, tmp_path / "clip.mp4"
    write_film(film, **options)
    write_clip(film, start, start + 3, clip)
    shared = coded(clip) & coded(film)
    assert len(shared) == (len(coded(clip)) if is_copied else 0)
    with av.open(str(clip)) as container:
        assert "mp4" in container.format.name
        assert container.streams.video[0].codec_context.name == "h264"
        if options.get("sound", "aac"):
            assert container.streams.audio[0].duration * container.streams.audio[
                0
            ].time_base == pytest.approx(3, abs=0.1)
        assert float(container.streams.video[0].duration * container.streams.video[0].time_base) < 4
    # Up to three frames that others refer to are behind the end of a copy.
    found = levels(clip)
    assert 28 <= len(found) <= 33
    late = 0.35 if name.endswith(".avi") else 0.15
    for time, level in found:
        assert (level - FIRST) / RATE == pytest.approx(start + time, abs=late)


def test_a_copy_does_not_start_far_before_its_part(tmp_path):
    film, clip = tmp_path / "film.mkv", tmp_path / "clip.mp4"
    write_film(film, sound="", rate=1, g="1000")
    write_clip(film, 40.0, 43.0, clip)
    assert not coded(clip) & coded(film)
    assert len(levels(clip)) == 3


def test_a_browser_plays_a_copy_from_its_start(browser, tmp_path):
    film, clip = tmp_path / "film.ts", tmp_path / "clip.mp4"
    write_film(film)
    write_clip(film, 4.25, 7.25, clip)
    page = browser.new_page()
    page.route("http://clip/*", lambda route: route.fulfill(path=clip, content_type="video/mp4"))
    page.route(
        "http://clip/", lambda route: route.fulfill(body="<video>", content_type="text/html")
    )
    page.goto("http://clip/")
    duration, level = page.evaluate(
        """async () => {
          const video = document.querySelector('video');
          video.src = '/clip.mp4';
          await new Promise((done, fail) => {
            video.onloadeddata = done;
            video.onerror = () => fail(video.error.message);
          });
          const canvas = document.createElement('canvas').getContext('2d');
          canvas.drawImage(video, 0, 0);
          const { data } = canvas.getImageData(0, 0, 64, 48);
          const red = data.filter((_, n) => n % 4 === 0);
          return [video.duration, red.reduce((a, b) => a + b) / red.length];
        }"""
    )
    page.close()
    assert duration == pytest.approx(3, abs=0.5)
    assert (level - FIRST) / RATE == pytest.approx(4.25, abs=0.15)
