"""Makes films of short clips, with the time of each clip."""

import contextlib
import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from drl_jax.data.video import VIDEO_SUFFIXES, VideoError, count_frames, decode, ffmpeg_errors
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import files_below

# Longest gap between two clips, and length of a cross-fade, seconds.
_LONGEST_GAP, _FADE = 2.0, 0.5
# Side of the picture, and frame rate, of films of clips that differ in theirs.
_SIDE, _FPS = 256, 25


class Clip(NamedTuple):
    """A short video.

    Attributes:
      path: of its file.
      caption: what it shows.
      frames: uint8 [F, H, W, 3].
    """

    path: Path
    caption: str
    frames: np.ndarray


class Part(NamedTuple):
    """A clip in a film.

    Attributes:
      clip: index of the clip.
      start: seconds.
      end: seconds; a cross-fade belongs to no clip.
    """

    clip: int
    start: float
    end: float


class Film(NamedTuple):
    """A film and the clips in it."""

    path: Path
    parts: list[Part]


def read_clips(videos: Path) -> tuple[list[Clip], int]:
    """Reads the clips of a split of a drawn dataset, in the order of its captions.

    Args:
      videos: `.../videos/SPLIT`, beside `SHAPES_SPLIT.csv`.

    Returns:
      The clips, and their frames a second.

    Raises:
      UserError: there is no such folder, file or clip.
    """
    captions = videos.parent.parent / f"SHAPES_{videos.name}.csv"
    if not videos.is_dir() or not captions.is_file():
        raise UserError(
            f"no clips in {videos} with captions in {captions}; README's first command draws them,"
            " --videos names their folder"
        )
    with captions.open(encoding="utf-8", newline="") as file:
        rows = [(row["video_id"], row["sentence"]) for row in csv.DictReader(file)]
    paths = [videos / f"{video}.mp4" for video, _ in rows]
    if absent := [path for path in paths if not path.is_file()]:
        raise UserError(f"no clip {absent[0]}; README's first command draws it")
    clips = [
        Clip(path, sentence, read_all(path))
        for path, (_, sentence) in zip(paths, rows, strict=True)
    ]
    return clips, round(count_frames(paths[0])[1])


def read_all(path: Path) -> np.ndarray:
    """All frames of a file: uint8 [F, H, W, 3]."""
    with ffmpeg_errors(path), contextlib.closing(decode(path)) as frames:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames if frame is not None])


def write_hour(
    path: Path, clips: Sequence[Clip], fps: int, seconds: float, seed: int, *, fades: bool = False
) -> list[Part]:
    """Writes a film of clips in random order, with gaps of a plain colour of 0 to 2 seconds.

    All clips are shown before one is shown again. A cross-fade takes half a second between two
    shots, from the last picture of one to the first of the next: it shortens neither.

    Args:
      path: mp4 file to write.
      clips: all of one size.
      fps: their frames a second.
      seconds: length of the film at most.
      seed: of the order, the gaps and their colours.
      fades: whether to cross-fade for half a second, instead of cutting.

    Returns:
      The parts, by their start.
    """
    rng = np.random.default_rng(seed)
    fade = round(_FADE * fps) if fades else 0
    limit, length = int(seconds * fps), 0
    shots: list[np.ndarray] = []
    parts: list[Part] = []
    order: list[int] = []
    while True:
        order = order or list(map(int, rng.permutation(len(clips))))
        clip = order.pop()
        gap = int(rng.integers(0, int(_LONGEST_GAP * fps) + 1))
        colour = rng.integers(0, 256, 3).astype(np.uint8)
        frames = clips[clip].frames
        added = [np.broadcast_to(colour, (gap, *frames.shape[1:]))] if gap else []
        for shot in (*added, frames):
            start = length + fade * (length > 0)
            length = start + len(shot)
        if length > limit:
            break
        shots += [*added, frames]
        parts.append(Part(clip, start / fps, length / fps))
    write_h264(path, _joined(shots, fade), fps)
    return parts


def write_joined(path: Path, clips: Sequence[Clip], fps: int, seed: int | None) -> list[Part]:
    """Writes a film of all clips without gaps, in random order or, without a seed, in theirs.

    See `write_hour`.
    """
    order = list(range(len(clips)))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    edges = (np.cumsum([0, *(len(clips[clip].frames) for clip in order)]) / fps).tolist()
    write_h264(path, _joined([clips[clip].frames for clip in order], 0), fps)
    return [
        Part(clip, start, end)
        for clip, (start, end) in zip(order, itertools.pairwise(edges), strict=True)
    ]


def _joined(shots: Sequence[np.ndarray], fade: int) -> Iterator[np.ndarray]:
    """The frames of shots, with `fade` mixed ones between two."""
    last = None
    for shot in shots:
        for step in range(1, fade + 1) if last is not None else ():
            share = step / (fade + 1)
            yield ((1 - share) * last + share * shot[0]).round().astype(np.uint8)
        yield from shot
        last = shot[-1]


def write_files(path: Path, folder: Path) -> tuple[list[Path], list[Part]]:
    """Writes a film of all videos in a folder, in the order of their names.

    The picture is the middle square, which is what a model sees by default.

    Returns:
      The files that could be read, and where they are in the film.
    """
    files = [path for path in files_below(folder) if path.suffix.lower() in VIDEO_SUFFIXES]
    used: list[Path] = []
    parts: list[Part] = []

    def frames() -> Iterator[np.ndarray]:
        written = 0
        for file in files:
            start = written
            with contextlib.suppress(VideoError):
                for frame in _at_one_rate(file):
                    written += 1
                    yield frame
            if written > start:
                parts.append(Part(len(used), start / _FPS, written / _FPS))
                used.append(file)

    write_h264(path, frames(), _FPS)
    return used, parts


def _at_one_rate(path: Path) -> Iterator[np.ndarray]:
    """The frames of a file in one size, at `_FPS` by repeating frames or leaving them out."""
    with ffmpeg_errors(path):
        _, fps = count_frames(path)
        written = 0
        with contextlib.closing(decode(path)) as frames:
            for number, frame in enumerate(frame for frame in frames if frame is not None):
                until = round((number + 1) / fps * _FPS)
                if until > written:
                    small = _square(frame)
                    yield from [small] * (until - written)
                    written = until


def _square(frame: av.VideoFrame) -> np.ndarray:
    """The middle square of a frame: uint8 [side, side, 3]."""
    scale = _SIDE / min(frame.width, frame.height)
    width, height = round(frame.width * scale), round(frame.height * scale)
    left, top = (width - _SIDE) // 2, (height - _SIDE) // 2
    scaled = frame.reformat(width, height, "rgb24").to_ndarray()
    return scaled[top : top + _SIDE, left : left + _SIDE]


def write_h264(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """Writes frames, uint8 [H, W, 3], as H.264 in mp4, lossy as films are (CRF 23)."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast"}
        # One thread: the same bytes on every run.
        stream.codec_context.thread_count = 1
        for number, array in enumerate(frames):
            if not number:
                stream.height, stream.width = array.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
