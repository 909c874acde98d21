"""Video files to frames: decode, sample, resize. No jax in here: build workers import it.

The result equals the reference's (decord + PIL + torchvision's crop) bit for bit wherever a correct
decoder can: one sequential pass of one thread, frames counted as decoded, no seeking (it picks
wrong frames in files with edit lists or B-frames in AVI), swscale's default flags.
"""

from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

# Beyond this ratio of sides the resize to a square's short side would not fit in memory.
_MAX_ASPECT_RATIO = 64


class VideoError(ValueError):
    """A file that gives no frames; the message says why, without the path."""


def sample_positions(n_frames: int, fps: float, max_frames: int) -> list[int]:
    """Which frames to take: one a second, thinned out evenly if these are too many.

    Args:
      n_frames: frames of the video.
      fps: its average rate; the stride is this number rounded (the reference's), at least 1.
      max_frames: how many to return at most.

    Returns:
      Increasing frame numbers.
    """
    positions = range(0, n_frames, max(1, round(fps)))
    if len(positions) <= max_frames:
        return list(positions)
    return [positions[i] for i in np.linspace(0, len(positions) - 1, num=max_frames, dtype=int)]


def resize_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Bicubic resize of the short side to `size`, then the central square.

    Args:
      image: uint8 [H, W, 3].
      size: side of the result, pixels.

    Returns:
      uint8 [size, size, 3].

    Raises:
      VideoError: the picture is too thin to be resized.
    """
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    if long > _MAX_ASPECT_RATIO * short:
        raise VideoError(f"picture of {width} x {height} pixels is too thin to resize")
    # torchvision's arithmetic: the long side is cut, the crop's offset rounded half to even.
    scaled = int(size * long / short)
    new_width, new_height = (size, scaled) if width <= height else (scaled, size)
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def read_frames(path: Path, max_frames: int, size: int) -> np.ndarray:
    """Decodes a video's sampled frames.

    Damaged packets are skipped; a file that ends early gives the frames it has.

    Args:
      path: any file that FFmpeg reads.
      max_frames: see `sample_positions`.
      size: side of the square frames, pixels.

    Returns:
      uint8 [F, size, size, 3], 1 <= F <= max_frames.

    Raises:
      VideoError: no frame could be decoded; the message says why.
    """
    try:
        n_frames, fps = _count_frames(path)
        positions = sample_positions(n_frames, fps, max_frames)
        frames = _decode_positions(path, positions, size)
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"cannot be read as a video ({reason})") from error
    if not frames:
        raise VideoError("no frame could be decoded")
    return np.stack(frames)


def _video_stream(container: av.container.InputContainer):
    stream = container.streams.best("video")
    if stream is None:
        raise VideoError("has no video stream")
    if stream.disposition & av.stream.Disposition.attached_pic:
        raise VideoError("has no video stream, only a cover picture")
    return stream


def _count_frames(path: Path) -> tuple[int, float]:
    """Packets of the best stream (the reference's frame count; headers lie) and its rate."""
    with av.open(str(path)) as container:
        stream = _video_stream(container)
        rate = stream.average_rate or stream.guessed_rate or 1
        return sum(1 for packet in container.demux(stream) if packet.size), float(rate)


def _decode_positions(path: Path, positions: list[int], size: int) -> list[np.ndarray]:
    wanted, frames = set(positions), []
    reformatter = VideoReformatter()  # one for all frames: it keeps the scaler's set-up
    position = 0
    with av.open(str(path)) as container:
        stream = _video_stream(container)
        # Frame threads give different pictures on each reading of a damaged file.
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in decoded:
                if position in wanted:
                    rgb = reformatter.reformat(frame, format="rgb24").to_ndarray()
                    quarter_turns = round(frame.rotation) % 360 // 90
                    rgb = np.ascontiguousarray(np.rot90(rgb, quarter_turns))
                    frames.append(resize_crop(rgb, size))
                position += 1
            if positions and position > positions[-1]:
                break
    return frames
