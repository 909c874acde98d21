"""Pictures and clips of video files, for the page, and what editing programs have to know of them.

A clip is an mp4 file of H.264 and AAC, which browsers play. FFmpeg may crash or hang on a damaged
file: the server calls these functions in processes, for which this module does not import jax.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeAlias

import av
from av.video.frame import PictureType
from PIL import Image

from drl_jax.data.pictures import FrameConverter, what_is_changed
from drl_jax.data.video_file import VideoError, deinterlaced, ffmpeg_errors, open_container

# Longest clip, seconds.
MAX_CLIP = 60.0
# Times of a file and of an address are rounded to milliseconds, seconds.
ROUNDING = 1e-3
# Largest picture and clip, pixels.
_PICTURE_SIDE, _CLIP_SIDE = 640, 1280
_TIME_BASE = Fraction(1, 90_000)
# Seconds before a time from which a frame is looked for. Containers with an index seek to the key
# frame before a time, others anywhere.
_LEADS = (0.0, 5.0, 20.0)
_Container: TypeAlias = av.container.InputContainer
_Stream: TypeAlias = av.stream.Stream


def read_picture(path: Path, time: float) -> bytes:
    """A JPEG file with the frame of a video at a time, or the last one if the time is later.

    Raises VideoError if no frame can be decoded, and Unavailable if the file cannot be read.
    """
    frame = None
    with ffmpeg_errors(path):
        with _decoding(path, time) as (container, (video, *_), first):
            aspect = float(video.sample_aspect_ratio or 1)
            for frame in deinterlaced(_frames(container.demux(video))):
                if frame.time is None or frame.time - first >= time - ROUNDING:
                    break
        if frame is None:
            raise VideoError("no frame could be decoded")
        picture = Image.fromarray(FrameConverter(as_shown=True)(frame))
    if aspect != 1 and not round(frame.rotation) % 180:
        picture = picture.resize((max(1, round(picture.width * aspect)), picture.height))
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


class Timing(NamedTuple):
    """What a file says of itself: of its first video stream, and whether it has sound."""

    rate: Fraction  # Average, frames a second.
    may_vary: bool  # Whether the time stamps have another rate, and no multiple.
    timecode: str  # Of the first frame; empty without one.
    width: int
    height: int
    has_sound: bool


def read_timing(path: Path) -> Timing:
    """Raises VideoError if a file cannot be opened, and Unavailable if it cannot be read."""
    with ffmpeg_errors(path), _opened(path, 0) as (container, (video, *sound), _):
        rate = video.average_rate or video.guessed_rate or Fraction(25)
        stated = (one.metadata.get("timecode") for one in (container, *container.streams))
        code = next(filter(None, stated), "")
        ratio = float((video.base_rate or rate) / rate)
        may_vary = abs(ratio - round(ratio)) > 1e-3
        return Timing(Fraction(rate), may_vary, code, video.width, video.height, bool(sound))


def write_clip(path: Path, start: float, end: float, out: Path) -> None:
    """Encodes a part of a video, seconds from its first frame, as `read_picture` a picture."""
    # The header comes first, so that a browser plays while it loads.
    options = {"movflags": "faststart"}
    with ffmpeg_errors(path), av.open(str(out), "w", format="mp4", options=options) as clip:
        _encode(path, start, end, clip)


def _encode(path: Path, start: float, end: float, clip: av.container.OutputContainer) -> None:
    outputs: dict[str, _Stream] = {}
    packets: list[av.Packet] = []
    last, done, to_rgb = -1, set(), FrameConverter(as_shown=True)
    with _decoding(path, start) as (container, inputs, first):
        wanted = (p for p in container.demux(inputs) if p.stream.type not in done)
        for frame in deinterlaced(_frames(wanted)):
            kind = "audio" if isinstance(frame, av.AudioFrame) else "video"
            time = -1.0 if frame.time is None else frame.time - first + ROUNDING
            if time >= end:
                done.add(kind)
            if len(done) == len(inputs):
                break
            if not start <= time < end:
                continue
            if kind == "audio":
                if kind not in outputs:
                    outputs[kind] = clip.add_stream("aac", rate=frame.sample_rate, layout="stereo")
                # The ticks of AVI are longer than a packet of AAC.
                frame.time_base = Fraction(1, frame.sample_rate)
                frame.pts = round(max(0, time - ROUNDING - start) / frame.time_base)
            else:
                frame = _even(frame, to_rgb)
                if kind not in outputs:
                    outputs[kind] = _video_stream(clip, frame, inputs[0])
                # The times of an AVI file with B-frames go back and forth; an encoder fails then.
                last = max(last + 1, round((time - ROUNDING - start) / _TIME_BASE))
                frame.pts, frame.time_base = last, _TIME_BASE
            packets += outputs[kind].encode(frame)
    packets += [packet for output in outputs.values() for packet in output.encode()]
    if "video" not in outputs:
        raise VideoError("has no frame in this part")
    # A clip has its streams before the first packet; sound may start after many pictures.
    clip.mux(packets)


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


def _even(frame: av.VideoFrame, to_rgb: FrameConverter) -> av.VideoFrame:
    """The frame upright and at most _CLIP_SIDE wide and high, with the even sides of H.264."""
    if round(frame.rotation) % 360 or what_is_changed(frame):
        frame = av.VideoFrame.from_ndarray(to_rgb(frame), format="rgb24")
    scale = min(1, _CLIP_SIDE / max(frame.width, frame.height))
    width, height = (max(2, 2 * round(side * scale / 2)) for side in (frame.width, frame.height))
    picture = frame.reformat(width, height, "yuv420p")
    # Not the type that the frame has in its file, which the encoder would keep.
    picture.pict_type = PictureType.NONE
    return picture


def _frames(packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame | av.AudioFrame]:
    for packet in packets:
        with contextlib.suppress(av.error.InvalidDataError):
            yield from packet.decode()


def _decoding(path: Path, time: float) -> contextlib.AbstractContextManager:
    """Opens a video before a time, at a frame from which it can be decoded."""
    earlier = (time - lead for lead in _LEADS if time > lead)
    return _opened(path, next((start for start in earlier if _can_start(path, start, time)), 0.0))


def _can_start(path: Path, start: float, time: float) -> bool:
    """Whether decoding can start there: some files name key frames that are none."""
    with _opened(path, start) as (container, (video, *_), first):
        frame = next(_frames(container.demux(video)), None)
        if frame is None or frame.is_corrupt or frame.time is None:
            return False
        return frame.time - first <= time + ROUNDING


@contextlib.contextmanager
def _opened(path: Path, time: float) -> Iterator[tuple[_Container, list[_Stream], float]]:
    """Opens a video before a time; yields its container, streams and first time stamp."""
    with open_container(path) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise VideoError("has no video stream that FFmpeg decodes")
        first = float((stream.start_time or 0) * (stream.time_base or 0))
        if time > 0 and stream.time_base:
            # Without an index of the file, it is decoded from its start.
            with contextlib.suppress(av.error.FFmpegError):
                container.seek(int((first + time) / stream.time_base), stream=stream)
        sound = container.streams.best("audio")
        yield container, [stream] if sound is None else [stream, sound], first
