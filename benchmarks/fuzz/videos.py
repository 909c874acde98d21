"""Videos of several containers and codecs, read frame by frame and inspected completely."""

import hashlib
from pathlib import Path
from random import Random

import av
import numpy as np

from benchmarks.fuzz.damage import LEGITIMATE, Damage, damage_file
from benchmarks.fuzz.runner import InvalidResult
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.video import inspect_video, read_timed_frames

_MAX_FRAMES, _FORM = 4, FrameForm(32)
_TITLE = "Café"
# File name: codec and pixel format.
_VIDEOS = {
    "h264.mp4": ("libx264", "yuv420p"),
    "mpeg4.mp4": ("mpeg4", "yuv420p"),
    "h264.mov": ("libx264", "yuv420p"),
    "h264.mkv": ("libx264", "yuv420p"),
    "vp9.webm": ("libvpx-vp9", "yuv420p"),
    "vp8.webm": ("libvpx", "yuv420p"),
    "mpeg4.avi": ("mpeg4", "yuv420p"),
    "mjpeg.avi": ("mjpeg", "yuvj420p"),
    "anim.gif": ("gif", "rgb8"),
    "h264.flv": ("libx264", "yuv420p"),
}
# Names of codecs in the files.
_CODEC_TAGS = (b"avc1", b"mp4v", b"FMP4", b"MJPG", b"V_MPEG4/ISO/AVC", b"V_VP9", b"V_VP8")
_MANY = 24


def prepare(root: Path, clips: Path | None = None) -> None:
    """Writes the videos, and copies the smaller files of `clips`."""
    for name, (codec, pixels) in _VIDEOS.items():
        write_video(root / "subjects" / name / name, codec, pixels)
    if clips is not None:
        files = sorted(path for path in clips.iterdir() if path.is_file())
        for path in [path for path in files if path.stat().st_size < 2**22][:_MANY]:
            target = root / "subjects" / f"clip_{path.name}" / path.name
            target.parent.mkdir(parents=True)
            target.write_bytes(path.read_bytes())


def write_video(path: Path, codec: str, pixels: str, seed: int = 0, rate: int = 10) -> None:
    """Writes 20 frames of a moving square, with a title; another seed gives another colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata["title"] = _TITLE
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
        for number in range(20):
            frame = np.full((48, 64, 3), 4 * number, np.uint8)
            frame[8:24, number : number + 16] = np.random.default_rng(seed).integers(256, size=3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def damage(root: Path, name: str, directory: Path, random: Random) -> Damage:
    """Damages bytes, the title's encoding, or the name of the codec."""
    del root, name
    (path,) = directory.iterdir()
    choice = random.random()
    if choice < 0.06 and latin_1_title(path):
        return Damage("title in Latin-1", LEGITIMATE)
    if choice < 0.16 and (tag := unknown_codec(path, random)):
        return Damage(f"codec {tag!r} renamed", LEGITIMATE)
    return Damage(damage_file(path, random), LEGITIMATE)


def latin_1_title(path: Path) -> bool:
    """Writes the title as Latin-1, as much software does; whether the file has one."""
    data = path.read_bytes()
    damaged = data.replace(_TITLE.encode(), _TITLE.encode("latin-1") + b" ")
    path.write_bytes(damaged)
    return damaged != data


def unknown_codec(path: Path, random: Random) -> bytes:
    """Replaces the codec's name by one that nobody knows; empty if the file has none."""
    data = path.read_bytes()
    found = [tag for tag in _CODEC_TAGS if tag in data]
    if not found:
        return b""
    tag = random.choice(found)
    path.write_bytes(data.replace(tag, bytes(random.choices(range(65, 91), k=len(tag)))))
    return tag


def read(root: Path, name: str, directory: Path) -> str:
    """Digest of the sampled frames, their times and the facts of the file."""
    del root
    path = next(directory.iterdir(), directory / name)  # It may be deleted.
    frames, times = read_timed_frames(path, _MAX_FRAMES, _FORM)
    count = len(frames)
    if frames.shape != (count, *_FORM.shape) or frames.dtype != np.uint8 or count > _MAX_FRAMES:
        raise InvalidResult(f"frames are {frames.dtype} {frames.shape}")
    if times.shape != (count,) or not np.isfinite(times).all():
        raise InvalidResult(f"times are {times}")
    facts = inspect_video(path, _MAX_FRAMES, _FORM)
    if not all(np.isfinite([facts.fps, facts.duration])) or facts.frames < count:
        raise InvalidResult(f"{count} frames were read, but the facts are {facts}")
    digest = hashlib.sha256(frames.tobytes() + times.tobytes()).hexdigest()
    return f"{digest} {facts}"
