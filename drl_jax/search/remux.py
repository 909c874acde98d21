"""Clips of videos that a browser plays but for their container: copied, not encoded again.

Worker processes import this module, so it does not import jax.
"""

from collections.abc import Iterator
from pathlib import Path

import av

# The header comes first, so that a browser plays while it loads.
MP4_OPTIONS = {"movflags": "faststart"}
# What browsers play in mp4. H.264 with other pixels, e.g. of 10 bits, is played by few.
_PIXELS = {"yuv420p", "yuvj420p"}
_SOUND = {"aac", "mp3"}
# A copy starts at a key frame, at most so many seconds before the clip: players decode these, too.
_MAX_LEAD = 20.0
# Seconds before the clip from which a key frame is looked for. Containers with an index seek to the
# one before a time, others anywhere.
_LEADS = (0.0, 5.0, _MAX_LEAD)


def can_copy(container: av.container.InputContainer) -> bool:
    """Whether only the container of a video keeps browsers from playing it.

    Args:
      container: of the file, open.
    """
    video, sound = container.streams.best("video"), container.streams.best("audio")
    formats = container.format.name.split(",")
    return (
        "mp4" not in formats
        and _codec(video) == "h264"
        and video.codec_context.pix_fmt in _PIXELS
        # AVI has no times of presentation; they follow those of decoding only without B-frames.
        and not ("avi" in formats and video.codec_context.has_b_frames)
        and (sound is None or _codec(sound) in _SOUND)
    )


def write_copy(
    container: av.container.InputContainer, first: float, start: float, end: float, out: Path
) -> bool:
    """Copies the packets of a part of a video to an mp4 file.

    The file has the frames from the key frame before `start` on, and players show those from
    `start` on.

    Args:
      container: of the file, open; see `can_copy`.
      first: time stamp of the first frame, seconds.
      start: seconds from the first frame.
      end: seconds.
      out: the file.

    Returns:
      Whether it was written: not without a key frame in the 20 seconds before, nor where packets
      have no time stamps.
    """
    video, sound = container.streams.best("video"), container.streams.best("audio")
    inputs = [video] if sound is None else [video, sound]
    if not any(_seek(container, video, first + start, lead) for lead in _LEADS):
        return False
    done: set[int] = set()
    with av.open(str(out), "w", format="mp4", options=MP4_OPTIONS) as clip:
        outputs = {stream.index: clip.add_stream_from_template(stream) for stream in inputs}
        for packet in _with_times(container.demux(inputs), video):
            if packet.pts is None or packet.dts is None:
                return False
            pts, dts = (float(stamp * packet.time_base) for stamp in (packet.pts, packet.dts))
            # A frame that is shown later may be needed to decode one that is shown before the end.
            if (dts if packet.stream is video else pts) >= first + end:
                done.add(packet.stream.index)
            if len(done) == len(inputs):
                break
            is_early = packet.stream is not video and pts < first + start
            if packet.stream.index in done or is_early:
                continue
            shift = round((first + start) / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = outputs[packet.stream.index]
            clip.mux(packet)
    return True


def _codec(stream: av.stream.Stream | None) -> str:
    if stream is None or stream.codec_context is None:
        return ""
    return stream.codec_context.codec.canonical_name


def _seek(
    container: av.container.InputContainer, video: av.VideoStream, time: float, lead: float
) -> bool:
    """Seeks to `lead` seconds before a time stamp; False if no key frame is between them."""
    where = round((time - lead) / video.time_base)
    try:
        container.seek(where, stream=video)
        packet = next((packet for packet in container.demux(video) if packet.is_keyframe), None)
        if packet is None or packet.pts is None:
            return False
        is_near = time - _MAX_LEAD <= packet.pts * packet.time_base <= time
        container.seek(where, stream=video)
    except av.error.FFmpegError:
        return False
    return is_near


def _with_times(packets: Iterator[av.Packet], video: av.VideoStream) -> Iterator[av.Packet]:
    """Packets from the first key frame on, the first ones with times of decoding.

    Matroska has no times of decoding; FFmpeg finds them but for the frames before it knows their
    order. These get times that decrease by the length of a frame.
    """
    waiting: list[av.Packet] = []
    has_started = knows_order = False
    for packet in packets:
        if not packet.size:
            continue
        if packet.stream is not video or knows_order:
            yield packet
            continue
        has_started = has_started or packet.is_keyframe
        if not has_started:
            continue
        waiting.append(packet)
        if packet.dts is not None:
            for earlier, later in zip(waiting[-2::-1], waiting[:0:-1], strict=True):
                earlier.dts = later.dts - max(1, earlier.duration or 0)
            yield from waiting
            waiting, knows_order = [], True
    yield from waiting
