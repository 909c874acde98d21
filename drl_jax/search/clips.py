"""Pictures and clips of video files, for the page.

Worker processes import this module, so it does not import jax. FFmpeg may crash or hang on a
damaged file: the server calls these functions in a process with a time limit.
"""

import contextlib
import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.video.frame import PictureType
from PIL import Image

from drl_jax.data.video import RgbConverter, VideoError, ffmpeg_errors, open_container
from drl_jax.search.remux import MP4_OPTIONS, can_copy, write_copy

# Longest clip, seconds.
MAX_CLIP = 60.0
# Largest picture and clip, pixels.
_PICTURE_SIDE, _CLIP_SIDE = 640, 1280
_TIME_BASE = Fraction(1, 90_000)


def read_picture(path: Path, time: float) -> bytes:
    """A JPEG file with the frame of a video at a time.

    Args:
      path: any file that FFmpeg reads.
      time: seconds from the first frame; the last frame if it is later.

    Raises:
      VideoError: no frame can be decoded.
      Unavailable: the file cannot be read.
    """
    with ffmpeg_errors(path):
        frame, aspect = _frame_at(path, time)
        if frame is None:
            raise VideoError("no frame could be decoded")
        picture = Image.fromarray(RgbConverter()(frame))
    if aspect != 1 and not round(frame.rotation) % 180:
        picture = picture.resize((max(1, round(picture.width * aspect)), picture.height))
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def _frame_at(path: Path, time: float) -> tuple[av.VideoFrame | None, float]:
    """The frame at a time, the last one if it is later; and the width of its pixels by height."""
    last = None
    with _decoding(path, time) as (container, stream, first):
        for packet in container.demux(stream):
            for frame in _frames(packet):
                last = frame
                if frame.time is None or frame.time - first >= time - 1e-3:
                    return last, float(stream.sample_aspect_ratio or 1)
        return last, float(stream.sample_aspect_ratio or 1)


def write_clip(path: Path, start: float, end: float, out: Path) -> None:
    """Writes a part of a video as an mp4 file that browsers play: H.264 and AAC, or MP3.

    Where the file has them in another container, they are copied (`remux.py`); else it is encoded.

    Args:
      path: any file that FFmpeg reads.
      start: seconds from the first frame.
      end: seconds; at most MAX_CLIP after the start.
      out: the file.

    Raises:
      VideoError: it cannot be decoded, or has no frame there.
      Unavailable: it cannot be read.
    """
    with ffmpeg_errors(path):
        if _copied(path, start, end, out):
            return
        with av.open(str(out), "w", format="mp4", options=MP4_OPTIONS) as clip:
            if not _write_frames(path, start, end, clip):
                raise VideoError("has no frame in this part")


def _copied(path: Path, start: float, end: float, out: Path) -> bool:
    """Copies a part of a video if browsers play that; what cannot be copied can be encoded."""
    try:
        with _opened(path, 0.0) as (container, _, first):
            is_written = can_copy(container) and write_copy(container, first, start, end, out)
        # Some files name key frames that are none.
        return is_written and _can_start(out, 0.0)
    except (av.error.FFmpegError, ValueError):
        return False


def _write_frames(path: Path, start: float, end: float, clip: av.container.OutputContainer) -> int:
    """Writes the pictures and the sound between two times; returns the number of pictures."""
    count, last = 0, -1
    with _decoding(path, start) as (container, stream, first):
        sound = container.streams.best("audio")
        inputs = [stream] if sound is None else [stream, sound]
        video = audio = None
        packets: list[av.Packet] = []
        done = set()
        for packet in container.demux(inputs):
            if packet.stream.index in done:
                continue
            for frame in _frames(packet):
                time = None if frame.time is None else frame.time - first
                if time is None or time < start:
                    continue
                if time >= end:
                    done.add(packet.stream.index)
                    break
                if isinstance(frame, av.AudioFrame):
                    if audio is None:
                        audio = clip.add_stream("aac", rate=frame.sample_rate, layout="stereo")
                    # The ticks of AVI are longer than a packet of AAC.
                    frame.time_base = Fraction(1, frame.sample_rate)
                    frame.pts = round((time - start) / frame.time_base)
                    packets += audio.encode(frame)
                    continue
                picture = _even(frame)
                if video is None:
                    video = _video_stream(clip, picture, stream)
                # The times of an AVI file with B-frames go back and forth; an encoder fails then.
                last = max(last + 1, round((time - start) / _TIME_BASE))
                picture.pts, picture.time_base = last, _TIME_BASE
                packets += video.encode(picture)
                count += 1
            if len(done) == len(inputs):
                break
        for output in (video, audio):
            if output is not None:
                packets += output.encode()
        # A clip has its streams before the first packet; sound may start after many pictures.
        clip.mux(packets)
    return count


def _video_stream(
    clip: av.container.OutputContainer, picture: av.VideoFrame, source: av.VideoStream
) -> av.VideoStream:
    rate = source.average_rate or source.guessed_rate or Fraction(25)
    stream = clip.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "22"})
    stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
    stream.codec_context.time_base = _TIME_BASE
    stream.thread_count = 1
    if source.sample_aspect_ratio:
        stream.codec_context.sample_aspect_ratio = source.sample_aspect_ratio
    return stream


def _even(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame upright and at most _CLIP_SIDE wide and high, with the even sides of H.264."""
    if round(frame.rotation) % 360:
        frame = av.VideoFrame.from_ndarray(RgbConverter()(frame), format="rgb24")
    scale = min(1, _CLIP_SIDE / max(frame.width, frame.height))
    width, height = (max(2, 2 * round(side * scale / 2)) for side in (frame.width, frame.height))
    picture = frame.reformat(width, height, "yuv420p")
    # Not the type that the frame has in its file, which the encoder would keep.
    picture.pict_type = PictureType.NONE
    return picture


def _frames(packet: av.Packet) -> list[av.VideoFrame | av.AudioFrame]:
    """The frames of a packet; none if it is damaged."""
    try:
        return packet.decode()
    except av.error.InvalidDataError:
        return []


@contextlib.contextmanager
def _decoding(
    path: Path, time: float
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream, float]]:
    """Opens a video before a time; yields container, stream and the time stamp of its start."""
    if time > 0 and not _can_start(path, time):
        time = 0.0
    with _opened(path, time) as (container, stream, first):
        yield container, stream, first


def _can_start(path: Path, time: float) -> bool:
    """Whether decoding can start before a time: some files name key frames that are none."""
    with _opened(path, time) as (container, stream, _):
        for packet in container.demux(stream):
            for frame in _frames(packet):
                return not frame.is_corrupt
    return False


@contextlib.contextmanager
def _opened(
    path: Path, time: float
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream, float]]:
    with open_container(path) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise VideoError("has no video stream that FFmpeg decodes")
        first = float((stream.start_time or 0) * (stream.time_base or 0))
        if time > 0 and stream.time_base:
            # Without an index of the file, it is decoded from its start.
            with contextlib.suppress(av.error.FFmpegError):
                container.seek(int((first + time) / stream.time_base), stream=stream)
        yield container, stream, first
