"""Test videos: synthetic ones, and the expected results for the shared ones."""

import os
from pathlib import Path

import av
import numpy as np

# Files beside the repository; tests that need them are skipped if they are missing.
SHARED = Path(os.environ.get("DRL_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: int,
    *,
    codec: str = "libx264",
    title: str = "",
    **options: str,
):
    """Writes frames uint8 [F, H, W, 3] without loss, so that tests can expect exact values."""
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=fps, options={"qp": "0", **options})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def write_video_with_latin_title(path: Path, frames: np.ndarray, fps: int):
    """Like `write_video`, with a title in Latin-1, as many cameras and editors write it."""
    write_video(path, frames, fps, title="Cafe on the beach")
    path.write_bytes(path.read_bytes().replace(b"Cafe on", b"Caf\xe9 on"))


def write_video_of_unknown_codec(path: Path, frames: np.ndarray, fps: int):
    """Like `write_video`, to an mp4 file whose header names a codec that does not exist."""
    write_video(path, frames, fps)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))


def write_video_turned_right(path: Path, frames: np.ndarray, fps: int):
    """Like `write_video`, to an mp4 file whose header turns it right by 90 degrees."""
    write_video(path, frames, fps)
    content = path.read_bytes()
    matrix = content.index(b"tkhd") + 44
    turned = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(content[:matrix] + turned + content[matrix + len(turned) :])


def numbered_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Grey frames uint8 [count, height, width, 3]; frame n has level 4 n."""
    levels = np.arange(count, dtype=np.uint8) * 4
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


# Number of frames, or start of the error, of the files in SHARED / "hard_clips".
HARD = {
    "anim.gif": 2,
    "audio_only.mp4": "has no video stream",
    "av1_10bit.mkv": 3,
    "bitflips.mp4": 10,
    "fps_0p25.mp4": 3,
    "fps_1000.mp4": 3,
    "height_1px.mkv": "picture of 320 x 1",
    "hevc_10bit.mp4": 3,
    "long_10min.mp4": 12,
    "missing_moov.mp4": "cannot be read",
    "no_duration.webm": 5,
    "odd_161x91_444.mp4": 2,
    "odd_h91_420.avi": 2,
    "rotated_90.mp4": 3,
    "sar_16_9.mp4": 3,
    "short_0p3s.mp4": 1,
    "single_frame.mp4": 1,
    "text.mp4": "is not a video: its content is text",
    "truncated_60pct.mp4": 7,
    "vfr.mp4": 10,
    "vp9.webm": 3,
    "zero_byte.mp4": "cannot be read",
}
