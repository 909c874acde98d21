"""Opens video files and decodes their frames, in the order in which a viewer sees them.

Decoding workers import this module, so it does not import jax.

Frames are decoded in one thread, one after another from the first. Seeking returns wrong frames in
files with edit lists or with B-frames in AVI, so nothing is sought. Where the packets of a file say
with certainty which of them is which frame, `OpenVideo.read` decodes those alone on which a wanted
frame depends.
"""

import codecs
import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias, TypeVar

import av
import numpy as np

from drl_jax.runtime.errors import Unavailable, refusal

# Suffixes of video files, lower case.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv"),
    *(".flv", ".f4v", ".mpg", ".mpeg", ".mpe", ".3gp", ".3g2", ".ogv", ".gif"),
    *(".mts", ".m2ts", ".ts", ".qt", ".asf", ".vob"),
)
# FFmpeg's demuxers of files with these suffixes, also of raw streams (mpegvideo, m4v) and of FLV
# that nginx records (live_flv). None of them opens what a file names; concat, hls and others do.
_DEMUXERS = (
    *("mov", "avi", "matroska", "asf", "flv", "live_flv", "mpeg", "mpegvideo", "mpegts", "m4v"),
    *("ogg", "gif"),
)
_CONTAINER_OPTIONS = {"format_whitelist": ",".join(_DEMUXERS), "protocol_whitelist": "none"}
# Demuxers whose packets have the time at which their frame is seen; those of AVI do not.
_TIMED_DEMUXERS = {"mov", "matroska", "mpegts", "mpeg", "flv"}
# Codecs of which packets are left out. Decoders of others fill in what is damaged from the frame
# before, or leave out more than they were told to.
_DEPENDENT_CODECS = {"h264", "hevc", "vp9", "mpeg2video", "mpeg4"}
# The packets of a file are held in memory while it is open; a larger one is read twice, bytes.
_HELD = 64_000_000
# A viewer's clock goes on by a frame where that of the file goes back by more, or forward, seconds.
_LONGEST_BACK, _LONGEST_STILL = 1.0, 3600.0
# Decoders of an alpha plane, which FFmpeg's own decoders of these leave out.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_PYAV = int(av.__version__.partition(".")[0])
# Titles in Latin-1 are common, and PyAV below 19 raises an error for them by default.
_LENIENT = {"metadata_errors": "replace"} if _PYAV < 19 else {}
# From 17 on, PyAV converts a picture in as many threads as there are processors, which all have a
# decoder already.
IN_ONE_THREAD = {"threads": 1} if _PYAV >= 17 else {}


class Openable(Protocol):
    """A video inside another file; the suffix of the opened file's `name`, if any, is its own."""

    def open(self, mode: str = "rb") -> BinaryIO: ...


VideoFile = Path | Openable
# A frame, and when it is seen: seconds from the first frame of the file.
TimedFrame: TypeAlias = tuple[av.VideoFrame, float]
_Frame = TypeVar("_Frame", bound=av.VideoFrame | av.AudioFrame)


class VideoError(ValueError):
    """No frames can be read from a file; the message gives the reason, without the path."""


class _Uncertain(Exception):
    """What is decoded is not what the packets promise."""


@contextlib.contextmanager
def ffmpeg_errors(path: VideoFile) -> Iterator[None]:
    """Converts FFmpeg's errors, and those of impossible values in a file, to VideoError.

    Errors of the operating system, which say nothing about the content, become Unavailable.
    """
    try:
        yield
    except VideoError:
        raise
    # First: some are also errors of the operating system, e.g. EIO where a file is cut.
    except (av.error.FFmpegError, ValueError, ArithmeticError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"cannot be read as a video ({' '.join(reason.split())})") from error
    except (OSError, MemoryError) as error:
        found = error if isinstance(error, OSError) else refusal(error)
        raise Unavailable(getattr(path, "path", path), found) from error


class _Source:
    """A file as FFmpeg sees it, which would take an error of reading for the end."""

    def __init__(self, file: BinaryIO):
        self.name = f"video{Path(str(getattr(file, 'name', ''))).suffix}"
        self.tell, self._file = file.tell, file
        self.error: OSError | None = None

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self.error = error
            return b""

    def seek(self, offset: int, whence: int) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):  # A damaged file may name a place before its start.
            return -1


@contextlib.contextmanager
def open_container(path: VideoFile) -> Iterator[av.container.InputContainer]:
    """Opens a video with PyAV, also one whose titles are not UTF-8.

    FFmpeg gets the bytes and no name, which it could take for an address, and opens nothing else.

    Raises:
      VideoError: it is not a video.
      OSError: it cannot be opened or, also at the end of the context, read.
    """
    with path.open("rb") as file:
        source = _Source(file)
        try:
            try:
                container = av.open(source, container_options=_CONTAINER_OPTIONS, **_LENIENT)
            except av.error.FFmpegError as error:
                if text := _start_of_text(file):
                    reason = f"its content is text that starts with {text!r}"
                elif isinstance(error, av.error.ArgumentError):
                    reason = f"its format is none of {', '.join(_DEMUXERS)}"
                else:
                    raise
                raise VideoError(f"is not a video: {reason}") from error
            with container:
                yield container
        finally:
            if source.error is not None:
                raise source.error


def _start_of_text(file: BinaryIO) -> str:
    """The first words of a file of text, e.g. of a web page; empty for any other file."""
    file.seek(0)
    try:
        # A character may be cut.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(file.read(60))
    except UnicodeDecodeError:
        return ""
    text = " ".join(text.split())
    return text if text.isprintable() else ""


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        raise VideoError("has no video stream")
    if stream.disposition & av.stream.Disposition.attached_pic:
        raise VideoError("has no video stream, only a cover picture")
    if stream.codec_context is None:
        raise VideoError("has a video codec that FFmpeg cannot decode")
    return stream


@contextlib.contextmanager
def open_video(path: VideoFile, as_shown: bool = False) -> Iterator["OpenVideo"]:
    """Opens a video file and reads its packets, once.

    With `as_shown`, alpha planes are decoded, and pictures of two fields are deinterlaced.

    Raises, also at the end of the context:
      VideoError: it is not a video, or cannot be decoded.
      Unavailable: it cannot be read.
    """
    with ffmpeg_errors(path), open_container(path) as container:
        yield OpenVideo(path, container, as_shown)


class OpenVideo:
    """The best video stream of an open file.

    Attributes:
      count: number of its packets. The reference counts frames in the same way; the counts in
        headers are unreliable.
      fps: average frame rate.
      last_length: how long the last frame is shown, seconds.
      is_certain: whether the packets say with certainty which frames there are.
      has_alpha_plane: whether it is one that FFmpeg's own decoder leaves out.
      damaged_packets: how many could not be decoded when all frames were decoded last.
    """

    damaged_packets = 0

    def __init__(self, path: VideoFile, container: av.container.InputContainer, as_shown: bool):
        self._path, self._as_shown, self._container = path, as_shown, container
        self._stream = stream = _video_stream(container)
        # The packets, and the time stamp of each and whether it is a key frame.
        self._held: list[av.Packet] | None = []
        self._packets: list[tuple[int | None, bool]] = []
        self._is_decoded = False
        has_planes = stream.codec_context.codec.name in _ALPHA_DECODERS
        self.has_alpha_plane = has_planes and stream.metadata.get("alpha_mode") == "1"
        size, stamps = 0, []
        codec, last_decoded = stream.codec_context.codec.name, None
        is_certain = container.format.name.split(",")[0] in _TIMED_DEMUXERS
        is_certain &= codec in _DEPENDENT_CODECS
        for packet in container.demux(stream):
            if not packet.size:
                continue
            is_start = packet.is_keyframe and (codec != "h264" or _is_idr(packet, stream))
            self._packets.append((packet.pts, is_start))
            size += packet.size
            if size > _HELD:
                self._held = None
            if self._held is not None:
                self._held.append(packet)
            # An edit list discards what is before the start, and nothing else.
            is_early = packet.pts is not None and packet.pts < 0
            is_certain &= packet.pts is not None and is_early == packet.is_discard
            is_certain &= not packet.is_corrupt
            # Two recordings in one file have times that overlap.
            is_certain &= None in (last_decoded, packet.dts) or packet.dts > last_decoded
            last_decoded = packet.dts if packet.dts is not None else last_decoded
            if packet.pts is not None and not is_early:
                stamps.append((packet.pts, packet.duration or 0))
        self.count = len(self._packets)
        self.fps = float(stream.average_rate or stream.guessed_rate or 1)
        stamps.sort()
        # Time stamps of the frames in the order in which they are seen; None if the packets do not
        # say with certainty which frames there are.
        self._stamps: list[int] | None = [stamp for stamp, _ in stamps]
        known = [stamp for stamp, _ in self._packets if stamp is not None]
        first, is_key = self._packets[0] if self._packets else (None, False)
        is_certain &= is_key and first == min(known, default=None)
        stills = np.diff(self._stamps) * float(stream.time_base or 0)
        is_certain &= len(set(self._stamps)) == len(stamps) and bool(
            (stills < _LONGEST_STILL).all()
        )
        if not (is_certain and stamps):
            self._stamps = None
        self.is_certain = self._stamps is not None
        self.last_length = 1 / self.fps
        if self._stamps and stamps[-1][1]:
            self.last_length = float(stamps[-1][1] * stream.time_base)

    def _seconds(self, stamp: int) -> float:
        """Seconds of a time stamp: the float64 that `frame.time` is."""
        base = self._stream.time_base
        return float(stamp) * base.numerator / base.denominator

    @functools.cached_property
    def times(self) -> np.ndarray:
        """When the frames are seen, float64 [N] seconds from the first one; they increase."""
        if self._stamps is None:
            return np.array([time for _, time in self.timed_frames()])
        seconds = np.array([self._seconds(stamp) for stamp in self._stamps])
        return seconds - seconds[0]

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last one; decodes nothing."""
        if self._stamps is None:
            return self.count / self.fps
        return float(self.times[-1]) + self.last_length

    @property
    def header_duration(self) -> float:
        """The duration in the file's header, seconds; 0 if it has none."""
        if self._stream.duration and self._stream.time_base:
            return float(self._stream.duration * self._stream.time_base)
        return (self._container.duration or 0) / av.time_base

    def frames(self) -> Iterator[av.VideoFrame]:
        """Decodes all frames in display order; skips damaged packets."""
        decoded = self._all_frames()
        return deinterlaced(decoded) if self._as_shown else decoded

    def _all_frames(self) -> Iterator[av.VideoFrame]:
        self.damaged_packets = 0
        with self._decoding() as (packets, decoder):
            for packet in itertools.chain(packets, [None]):
                try:
                    yield from self._decode(decoder, packet)
                except av.error.InvalidDataError:
                    self.damaged_packets += 1

    def timed_frames(self) -> Iterator[TimedFrame]:
        """Decodes all frames, with times that never decrease."""
        last, shift = -1 / self.fps, None
        for frame in self.frames():
            # Without time stamps, assume a constant frame rate.
            expected = last + 1 / self.fps
            if frame.time is None:
                time = expected
            else:
                shift = expected - frame.time if shift is None else shift
                time = frame.time + shift
                if not last - _LONGEST_BACK < time < last + _LONGEST_STILL:
                    shift, time = expected - frame.time, expected
            last = max(time, last, 0.0)
            yield frame, last

    def read(
        self, positions: Sequence[int], convert: Callable[[av.VideoFrame], np.ndarray]
    ) -> tuple[list[np.ndarray], list[float]]:
        """Decodes and converts the frames with some numbers, which increase.

        Frames that cannot be decoded are left out. If what is decoded is not what the packets
        promise, `is_certain` becomes False, `times` may change, and decoded frames are counted.

        Returns:
          The converted frames and their times.
        """
        if self.is_certain:
            with contextlib.suppress(_Uncertain, av.error.InvalidDataError):
                return self._read_dependent(positions, convert)
            self.is_certain, self._stamps = False, None
            self.__dict__.pop("times", None)
        wanted, found = set(positions), []
        with contextlib.closing(self.timed_frames()) as frames:
            for number, (frame, time) in enumerate(frames):
                if number in wanted:
                    found.append((convert(frame), time))
                if number >= max(positions, default=0):
                    break
        return [picture for picture, _ in found], [time for _, time in found]

    def _read_dependent(
        self, positions: Sequence[int], convert: Callable[[av.VideoFrame], np.ndarray]
    ) -> tuple[list[np.ndarray], list[float]]:
        """The same by time stamps, without the packets on which no wanted frame depends."""
        stamps = [self._stamps[number] for number in positions if number < len(self._stamps)]
        wanted, pictures, found = set(stamps), [], []
        with self._decoding() as (packets, decoder):
            plan = _plan(self._packets, wanted)
            for packet, (is_decoded, is_last) in zip(packets, plan, strict=False):
                if not is_decoded:
                    continue
                decoder.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                decoded = self._decode(decoder, packet)
                if is_last:
                    decoded += self._decode(decoder, None)
                    decoder.flush_buffers()
                for frame in decoded:
                    if frame.is_corrupt or (self._as_shown and frame.interlaced_frame):
                        raise _Uncertain
                    if frame.pts in wanted:
                        found.append(frame.pts)
                        pictures.append(convert(frame))
        if found != stamps:
            raise _Uncertain
        first = self._seconds(self._stamps[0])
        return pictures, [self._seconds(stamp) - first for stamp in stamps]

    def _decode(
        self, decoder: av.VideoCodecContext, packet: av.Packet | None
    ) -> list[av.VideoFrame]:
        """Frames that follow from a packet, or from the end of all."""
        frames = decoder.decode(packet)
        for frame in frames:  # Those at the end have no unit of time.
            frame.time_base = self._stream.time_base
        return frames

    @contextlib.contextmanager
    def _decoding(self) -> Iterator[tuple[Iterable[av.Packet], av.VideoCodecContext]]:
        """The packets, and a decoder that has decoded nothing."""
        with contextlib.ExitStack() as stack:
            stream, packets = self._stream, self._held
            if packets is None or self._is_decoded:
                container = stack.enter_context(open_container(self._path))
                stream = _video_stream(container)
                packets = (packet for packet in container.demux(stream) if packet.size)
            self._is_decoded = True
            decoder = stream.codec_context
            if self._as_shown and self.has_alpha_plane:
                decoder = av.CodecContext.create(_ALPHA_DECODERS[decoder.codec.name], "r")
            # With frame threads, the decoded frames of a damaged file differ from run to run.
            decoder.thread_type, decoder.thread_count = "NONE", 1
            yield packets, decoder


def _is_idr(packet: av.Packet, stream: av.VideoStream) -> bool:
    """Whether a packet of H.264 has an IDR picture, after which nothing depends on what was before.

    Other packets that are called key frames begin an open group, or a refresh of many frames.
    """
    content, header = bytes(packet), stream.codec_context.extradata or b""
    if header[:1] != b"\x01":  # Units follow start codes.
        starts = (part[:1] for part in content.split(b"\0\0\1")[1:])
        return any(start and start[0] & 31 == 5 for start in starts)
    size, place = (header[4] & 3) + 1, 0
    while place + size < len(content):
        if content[place + size] & 31 == 5:
            return True
        place += size + int.from_bytes(content[place : place + size])
    return False


def _plan(
    packets: Sequence[tuple[int | None, bool]], wanted: Collection[int]
) -> Iterator[tuple[bool, bool]]:
    """Yields for each packet whether it is decoded, and whether it is the last of a group.

    A group begins with a key frame, after which nothing depends on what was before; frames that are
    seen before it may. It ends with its last wanted frame.
    """
    groups: list[list[int | None]] = []
    for stamp, is_key in packets:
        if is_key:
            groups.append([])
        groups[-1].append(stamp)
    joined: list[list[int | None]] = []
    for group in groups:
        if joined and any(stamp in wanted and stamp < group[0] for stamp in group):
            joined[-1] += group
        else:
            joined.append(group)
    for group in joined:
        last = max((n for n, stamp in enumerate(group) if stamp in wanted), default=-1)
        yield from ((number <= last, number == last) for number in range(len(group)))


def deinterlaced(frames: Iterable[_Frame]) -> Iterator[_Frame]:
    """Makes whole pictures of those of two fields, which are of different times; keeps the others.

    A picture is yielded after its successor was taken; sound is yielded at once.
    """
    graph, form = None, None
    waiting: collections.deque[av.VideoFrame] = collections.deque()

    def made() -> Iterator[av.VideoFrame]:
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while graph is not None:
                picture, frame = graph.pull(), waiting.popleft()
                picture.pts, picture.time_base = frame.pts, frame.time_base
                yield picture

    for frame in frames:
        if isinstance(frame, av.AudioFrame):
            yield frame
            continue
        if graph is not None and form != (frame.format.name, frame.width, frame.height):
            graph.push(None)
            yield from made()
            graph = None
        if graph is None and frame.interlaced_frame:
            form = frame.format.name, frame.width, frame.height
            graph = _deinterlacer(frame)
        if graph is None:
            yield frame
            continue
        waiting.append(frame)
        graph.push(frame)
        yield from made()
    if graph is not None:
        graph.push(None)
        yield from made()


def _deinterlacer(frame: av.VideoFrame) -> av.filter.Graph:
    """FFmpeg's bwdif, which looks at the pictures before and after."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    sink = graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph
