"""Pictures and clips of video files, for the page.

A clip is an mp4 file of H.264 and AAC or MP3, which browsers play. Where a file has these in
another container, they are copied; else it is encoded. FFmpeg may crash or hang on a damaged file:
the server calls these functions in processes, for which this module does not import jax.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
from av.video.frame import PictureType
from PIL import Image

from drl_jax.data.video import RgbConverter, VideoError, ffmpeg_errors, open_container

# Longest clip, seconds.
MAX_CLIP = 60.0
# Largest picture and clip, pixels.
_PICTURE_SIDE, _CLIP_SIDE = 640, 1280
_TIME_BASE = Fraction(1, 90_000)
_Container: TypeAlias = av.container.InputContainer
_Stream: TypeAlias = av.stream.Stream
# The header comes first, so that a browser plays while it loads.
_MP4_OPTIONS = {"movflags": "faststart"}
# What browsers play in mp4. H.264 with other pixels, e.g. of 10 bits, is played by few.
_PIXELS, _SOUND = {"yuv420p", "yuvj420p"}, {"aac", "mp3"}
# A copy starts at a key frame, at most so many seconds before the clip: players decode these, too.
_MAX_LEAD = 20.0
# Seconds before the clip from which a key frame is looked for. Containers with an index seek to the
# one before a time, others anywhere.
_LEADS = (0.0, 5.0, _MAX_LEAD)


def read_picture(path: Path, time: float) -> bytes:
    """A JPEG file with the frame of a video at a time, or the last one if the time is later.

    Raises VideoError if no frame can be decoded, and Unavailable if the file cannot be read.
    """
    frame = None
    with ffmpeg_errors(path):
        with _decoding(path, time) as (container, (video, *_), first):
            aspect = float(video.sample_aspect_ratio or 1)
            for frame in _frames(container.demux(video)):
                if frame.time is None or frame.time - first >= time - 1e-3:
                    break
        if frame is None:
            raise VideoError("no frame could be decoded")
        picture = Image.fromarray(RgbConverter()(frame))
    if aspect != 1 and not round(frame.rotation) % 180:
        picture = picture.resize((max(1, round(picture.width * aspect)), picture.height))
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def write_clip(path: Path, start: float, end: float, out: Path) -> None:
    """Writes a part of a video, seconds from its first frame, as an mp4 file that browsers play.

    A copy begins with the key frame before `start`, and players show it from `start` on. Raises
    VideoError if there is no frame that can be decoded, and Unavailable if it cannot be read.
    """
    with ffmpeg_errors(path):
        with contextlib.suppress(av.error.FFmpegError, ValueError):
            if _copy(path, start, end, out) and _can_start(out, 0.0):
                return
        with av.open(str(out), "w", format="mp4", options=_MP4_OPTIONS) as clip:
            _encode(path, start, end, clip)


def _copy(path: Path, start: float, end: float, out: Path) -> bool:
    """Copies packets if browsers play them; False if they cannot be copied."""
    with _opened(path, 0.0) as (container, inputs, first):
        video, start, end = inputs[0], first + start, first + end
        is_playable = _is_playable(container.format.name.split(","), *inputs)
        if not is_playable or not _seek(container, video, start):
            return False
        done: set[int] = set()
        with av.open(str(out), "w", format="mp4", options=_MP4_OPTIONS) as clip:
            outputs = {stream.index: clip.add_stream_from_template(stream) for stream in inputs}
            for packet in _with_times(container.demux(inputs), video):
                if packet.pts is None or packet.dts is None:
                    return False
                index, is_sound = packet.stream.index, packet.stream is not video
                pts, dts = (float(stamp * packet.time_base) for stamp in (packet.pts, packet.dts))
                # A frame that is shown later may be needed for one that is shown before the end.
                if (pts if is_sound else dts) >= end:
                    done.add(index)
                if len(done) == len(inputs):
                    break
                if index not in done and not (is_sound and pts < start):
                    shift = round(start / packet.time_base)
                    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                    packet.stream = outputs[index]
                    clip.mux(packet)
    return True


def _is_playable(formats: list[str], *streams: _Stream) -> bool:
    """Whether only the container of a video keeps browsers from playing it."""
    video, *sounds = (stream.codec_context for stream in streams)
    return (
        "mp4" not in formats
        and video.codec.canonical_name == "h264"
        and video.pix_fmt in _PIXELS
        # AVI has no times of presentation; they follow those of decoding only without B-frames.
        and not ("avi" in formats and video.has_b_frames)
        and all(sound and sound.codec.canonical_name in _SOUND for sound in sounds)
    )


def _seek(container: _Container, video: av.VideoStream, time: float) -> bool:
    """Seeks to a key frame at most _MAX_LEAD before a time stamp; False if none is found."""
    for lead in _LEADS:
        where = round((time - lead) / video.time_base)
        with contextlib.suppress(av.error.FFmpegError):
            container.seek(where, stream=video)
            key = next((p.pts for p in container.demux(video) if p.is_keyframe), None)
            if key is not None and 0 <= time - key * video.time_base <= _MAX_LEAD:
                container.seek(where, stream=video)
                return True
    return False


def _with_times(packets: Iterator[av.Packet], video: av.VideoStream) -> Iterator[av.Packet]:
    """Packets from the first key frame on, the first ones with times of decoding.

    Matroska has no times of decoding; FFmpeg finds them but for the frames before it knows their
    order. These get times that decrease by the length of a frame.
    """
    waiting: list[av.Packet] = []
    knows_order = False
    for packet in (packet for packet in packets if packet.size):
        if packet.stream is not video or knows_order:
            yield packet
        elif waiting or packet.is_keyframe:
            waiting.append(packet)
            if packet.dts is not None:
                for earlier, later in zip(waiting[-2::-1], waiting[:0:-1], strict=True):
                    earlier.dts = later.dts - max(1, earlier.duration or 0)
                yield from waiting
                waiting, knows_order = [], True
    yield from waiting


def _encode(path: Path, start: float, end: float, clip: av.container.OutputContainer) -> None:
    """Encodes the pictures and the sound between two times."""
    outputs: dict[str, _Stream] = {}
    packets: list[av.Packet] = []
    last, done = -1, set()
    with _decoding(path, start) as (container, inputs, first):
        for frame in _frames(p for p in container.demux(inputs) if p.stream.type not in done):
            kind = "audio" if isinstance(frame, av.AudioFrame) else "video"
            time = -1.0 if frame.time is None else frame.time - first
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
                frame.pts = round((time - start) / frame.time_base)
            else:
                frame = _even(frame)
                if kind not in outputs:
                    outputs[kind] = _video_stream(clip, frame, inputs[0])
                # The times of an AVI file with B-frames go back and forth; an encoder fails then.
                last = max(last + 1, round((time - start) / _TIME_BASE))
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


def _frames(packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """The frames of packets, without those of damaged ones."""
    for packet in packets:
        with contextlib.suppress(av.error.InvalidDataError):
            yield from packet.decode()


def _decoding(path: Path, time: float) -> contextlib.AbstractContextManager:
    """Opens a video before a time, from where it can be decoded."""
    return _opened(path, time if time > 0 and _can_start(path, time) else 0.0)


def _can_start(path: Path, time: float) -> bool:
    """Whether decoding can start before a time: some files name key frames that are none."""
    with _opened(path, time) as (container, (video, *_), _):
        frame = next(_frames(container.demux(video)), None)
        return frame is not None and not frame.is_corrupt


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
