"""Clips for the page, from files that browsers play and from others."""

from pathlib import Path

import av
import numpy as np
import pytest

from drl_jax.search.clips import write_clip

RATE, SECONDS = 10, 8  # Frames a second.
SOUND_RATE = 44_100
FIRST = 50  # Grey level.


def write_film(path: Path, *, sound: str = "aac", pixels: str = "yuv420p", **options: str) -> None:
    """Writes H.264 with B-frames; the mean of frame n is FIRST + n."""
    with av.open(str(path), "w") as container:
        options = {"g": "30", "sc_threshold": "0", "bf": "2", **options}
        video = container.add_stream("libx264", rate=RATE, options=options)
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


@pytest.mark.parametrize(
    ("name", "start", "options"),
    [
        ("start.mp4", 0.0, {}),
        ("mute ten bits.mkv", 4.25, {"sound": "", "pixels": "yuv420p10le"}),
        ("one key frame.mkv", 4.25, {"sound": "ac3", "g": "1000"}),
        ("stream.ts", 4.25, {}),
        ("flash.flv", 4.25, {"sound": "libmp3lame"}),
        # Its times of presentation are wrong.
        ("b-frames.avi", 4.25, {"sound": "libmp3lame"}),
    ],
)
def test_a_clip_has_the_pictures_and_the_sound_of_its_part(tmp_path, name, start, options):
    film, clip = tmp_path / name, tmp_path / "clip.mp4"
    write_film(film, **options)
    write_clip(film, start, start + 3, clip)
    with av.open(str(clip)) as container:
        assert "mp4" in container.format.name
        streams = {stream.type: stream for stream in container.streams}
        assert streams["video"].codec_context.name == "h264"
        assert ("audio" in streams) == bool(options.get("sound", "aac"))
        for stream in streams.values():
            assert float(stream.duration * stream.time_base) == pytest.approx(3, abs=0.2)
        pictures = [
            (frame.time, frame.to_ndarray(format="gray")) for frame in container.decode(video=0)
        ]
    assert 28 <= len(pictures) <= 31
    late = 0.35 if name.endswith(".avi") else 0.15
    for time, picture in pictures:
        assert (picture.mean() - FIRST) / RATE == pytest.approx(start + time, abs=late)


def test_a_browser_plays_a_clip_from_its_start(browser, tmp_path):
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
