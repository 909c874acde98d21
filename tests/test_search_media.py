"""Media of queries and of the page: pictures that are decoded, and clips that are made."""

import contextlib
import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from drl_jax.data.frame_form import FrameForm
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.worker_pool import CallPool
from drl_jax.search.clips import write_clip
from drl_jax.search.reading import open_picture

FORM = FrameForm(32)
ORIENTATION, QUARTER_TURN = 0x112, 6
COLOURS = np.array([[[250, 0, 0], [250, 0, 0]], [[0, 250, 0], [0, 0, 250]]], np.uint8)
PICTURE = np.kron(COLOURS, np.ones((40, 40, 1), np.uint8))


@pytest.fixture(scope="module")
def pool():
    with contextlib.closing(CallPool(1)) as pool:
        yield pool


@pytest.fixture
def opened(pool, tmp_path):
    """Decodes an image file: int [32, 32, 3]."""

    def open_content(content: bytes) -> np.ndarray:
        path = tmp_path / "file.jpg"
        path.write_bytes(content)
        frame = np.frombuffer(open_picture(pool, path, FORM, "the picture"), np.uint8)
        return frame.reshape(FORM.shape).astype(int)

    return open_content


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def is_like(frame: np.ndarray, quarters: np.ndarray) -> bool:
    """Whether the four quarters of a frame have these colours, but for compression."""
    inside = frame.reshape(2, 16, 2, 16, 3)[:, 4:12, :, 4:12].transpose(0, 2, 1, 3, 4)
    return bool(np.abs(inside - quarters[:, :, None, None]).max() < 12)


def test_formats_that_people_have(opened):
    image = Image.fromarray(PICTURE)
    several = {"save_all": True, "append_images": [image.rotate(90)]}  # The first one counts.
    for kind, options in (
        *(("JPEG", {}), ("PNG", {}), ("BMP", {}), ("AVIF", {})),
        *(("GIF", several), ("WebP", several), ("MPO", several)),
    ):
        if kind != "AVIF" or features.check("avif"):
            assert is_like(opened(saved(image, kind, **options)), COLOURS), kind
    assert is_like(opened(saved(image.convert("CMYK"), "JPEG")), COLOURS)


def test_pictures_are_turned_as_the_camera_was_held(opened):
    exif = Image.Exif()
    exif[ORIENTATION] = QUARTER_TURN
    for kind in ("PNG", "WebP", "JPEG"):
        content = saved(Image.fromarray(PICTURE), kind, exif=exif)
        assert is_like(opened(content), np.rot90(COLOURS, -1))
    # Metadata that are damaged are ignored.
    assert is_like(opened(content.replace(b"MM\0*", b"MM\0*\xff\xff")), COLOURS)


def test_transparency_is_white_and_16_bits_are_scaled(opened):
    # What is hidden is black, and no video shows it.
    for mode in ("RGBA", "P"):
        image = Image.fromarray(PICTURE).convert(mode)
        options = {"transparency": bytes(256)} if mode == "P" else {}
        if mode == "RGBA":
            image.putalpha(0)
        assert (opened(saved(image, "PNG", **options)) == 255).all()
    grey = Image.fromarray(np.full((40, 40), 1 << 15, np.uint16))
    assert (opened(saved(grey, "PNG")) == 128).all()


def png_of(width: int, height: int) -> bytes:
    """A PNG file that ends after its header."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + data + struct.pack(">I", 1000) + b"IDAT\x78\x9c"


def test_what_cannot_be_decoded_is_one_line(opened, pool, tmp_path):
    image = Image.fromarray(PICTURE)
    text = PngImagePlugin.PngInfo()
    text.add_text("text", "a" * (8 << 20), zip=True)
    not_one = "the picture is not a JPEG, PNG, .*AVIF file; convert it to one|BMP file; convert"
    for content, message in (
        # Pillow decodes these, too.
        *((saved(image, kind), not_one) for kind in ("EPS", "TIFF", "PPM", "ICO")),
        *((content, not_one) for content in (b"", b"text", b"<svg/>")),
        *((saved(image, kind)[:150], "the picture is damaged") for kind in ("PNG", "GIF", "BMP")),
        (saved(image, "JPEG")[:-200], "the picture is damaged"),
        (saved(image, "PNG", pnginfo=text), "the picture is damaged"),
        (png_of(100, 100), "the picture is damaged"),
        (saved(image.resize((1300, 20)), "PNG"), "cannot be used: picture of 1300 x 20 pixels"),
        (png_of(10_000, 10_000), "the picture has 10000 x 10000 pixels; at most 50,000,000 are"),
        (png_of(2**31 - 1, 2**31 - 1), "the picture has 2147483647 x 2147483647 pixels"),
    ):
        with pytest.raises(UserError, match=message):
            opened(content)
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"^{path} cannot be read: {reason}"):
            open_picture(pool, path, FORM)


def test_a_large_jpeg_is_scaled_while_it_is_decoded(opened):
    left = Image.new("L", (16_320, 12_240))  # 200 megapixels
    left.paste(250, (0, 0, 8_160, 12_240))
    frame = opened(saved(left, "JPEG", quality=30))
    assert np.abs(frame[:, :12] - 250).max() < 3 > np.abs(frame[:, 20:]).max()


def test_a_picture_that_takes_too_much_memory_is_one_line(opened):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    content = saved(frames[0], "WebP", save_all=True, append_images=frames[1:], lossless=True)
    # The decoder of animations makes two canvases of this size before it tells the size.
    size = content.index(b"VP8X") + 12
    large = content[:size] + 2 * struct.pack("<I", 16_382)[:3] + content[size + 6 :]
    with pytest.raises(UserError, match="the picture is damaged, or too large"):
        opened(large)


# ---------------------------------------------------------------------- clips

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
