"""Films of the test clips of `shapes`, with the time of each clip.

Shots follow each other in six ways; see `KINDS`.
"""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from drl_jax.data.video_file import open_video
from drl_jax.runtime.errors import UserError

# Frames a second of the clips, and of films of short events.
_FPS, _EVENT_FPS = 4, 8
# Background of a camera that does not move.
_STILL = np.array([20, 24, 22], np.float32)
# Levels by which an object differs from its background, at least.
_OBJECT = 40
# Seconds of the events, of the still picture before and after each, and their number.
_EVENT, _AROUND, _EVENTS = 1.0, 29.5, 40


class Clip(NamedTuple):
    """A short video: what it shows, and its frames, uint8 [F, H, W, 3]."""

    caption: str
    frames: np.ndarray


class Film(NamedTuple):
    """A film in memory."""

    frames: np.ndarray  # uint8 [F, H, W, 3]
    fps: int
    parts: list[tuple[int, float, float]]  # number of a clip, start and end, seconds


def read_clips(videos: Path, most: int) -> list[Clip]:
    """Reads at most `most` clips of a split of a drawn dataset, `videos`, in a random order."""
    captions = videos.parent.parent / "annotations.json"
    try:
        splits = json.loads(captions.read_text(encoding="utf-8"))["splits"]
        rows = [(video, texts[0]) for video, texts in splits[videos.name].items()]
        order = np.random.default_rng(0).permutation(len(rows))[:most]
        return [Clip(rows[n][1], _read_all(videos / f"{rows[n][0]}.mp4")) for n in order]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"no clips in {videos} with captions in {captions} ({error}); README's first command"
            " draws them, --videos names their folder"
        ) from error


def _read_all(path: Path) -> np.ndarray:
    """All frames of a file: uint8 [F, H, W, 3]."""
    with open_video(path) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.frames()])


def write_film(path: Path, film: Film) -> None:
    """Writes a film as H.264, lossy as films are."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=film.fps)
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "preset": "veryfast"}
        # One thread: the same bytes on every run.
        stream.codec_context.thread_count = 1
        stream.height, stream.width = film.frames.shape[1:3]
        for number, array in enumerate(film.frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, film.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_film(kind: str, clips: list[Clip]) -> Film:
    """Joins clips to a film of one of `KINDS`."""
    fps = _EVENT_FPS if kind == "event1s" else _FPS
    shots: list[np.ndarray] = []
    parts: list[tuple[int, float, float]] = []
    length = 0
    for number, frames in KINDS[kind](clips):
        if number is not None:
            parts.append((number, length / fps, (length + len(frames)) / fps))
        shots.append(frames)
        length += len(frames)
    film = np.concatenate(shots)
    return Film(_with_light(film) if kind == "flicker" else film, fps, parts)


# Frames of a shot, with the number of its clip if it has one.
Shots = Iterator[tuple[int | None, np.ndarray]]


def _hard(clips: list[Clip]) -> Shots:
    yield from ((number, clip.frames) for number, clip in enumerate(clips))


def _fade(clips: list[Clip]) -> Shots:
    for number, clip in enumerate(clips):
        if number:
            yield None, _mixed(clips[number - 1].frames[-1], clip.frames[0])
        yield number, clip.frames


def _static_gap(clips: list[Clip]) -> Shots:
    rng = np.random.default_rng(0)
    for number, clip in enumerate(clips):
        frames = _on_still(clip.frames)
        yield None, _still(frames, int(rng.integers(4, 25)))
        yield number, frames


def _static_smooth(clips: list[Clip]) -> Shots:
    rng = np.random.default_rng(0)
    for number, clip in enumerate(clips):
        frames = _on_still(clip.frames)
        empty = _still(frames, 1)[0]
        yield None, _mixed(empty, frames[0])
        yield number, frames
        yield None, _mixed(frames[-1], empty)
        yield None, _still(frames, int(rng.integers(0, 17)))


def _event1s(clips: list[Clip]) -> Shots:
    around = int(_AROUND * _EVENT_FPS)
    for number, clip in enumerate(clips[:_EVENTS]):
        count = round(_EVENT * _EVENT_FPS)
        frames = clip.frames[np.linspace(0, len(clip.frames) - 1, count).round().astype(int)]
        yield None, frames[:1].repeat(around, 0)
        yield number, frames
        yield None, frames[-1:].repeat(around, 0)


# hard: cuts. fade: cross-fades of half a second. static_gap: a camera that does not move; objects
# come and go, with gaps. static_smooth: they fade in and out. flicker: hard cuts, and the light
# jumps every 1.5 s. event1s: events of a second, each in a minute in which nothing else moves.
KINDS = {
    "hard": _hard,
    "fade": _fade,
    "static_gap": _static_gap,
    "static_smooth": _static_smooth,
    "flicker": _hard,
    "event1s": _event1s,
}


def _mixed(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The frames between two pictures, half a second."""
    share = np.linspace(0, 1, _FPS // 2 + 2)[1:-1, None, None, None]
    return (first * (1 - share) + last * share).astype(np.uint8)


def _on_still(frames: np.ndarray) -> np.ndarray:
    """The objects of a clip over the background of all clips."""
    frames = frames.astype(np.float32)
    background = frames[0, :3, :3].reshape(-1, 3).mean(0)
    object_share = np.abs(frames - background).max(-1, keepdims=True) / _OBJECT
    object_share = np.clip(object_share, 0, 1)
    return (frames * object_share + _STILL * (1 - object_share)).astype(np.uint8)


def _still(frames: np.ndarray, count: int) -> np.ndarray:
    return np.broadcast_to(_STILL.astype(np.uint8), (count, *frames.shape[1:]))


def _with_light(frames: np.ndarray) -> np.ndarray:
    """Light that goes on for 1.5 s, and off."""
    is_light = (np.arange(len(frames)) // int(1.5 * _FPS)) % 2 == 1
    gain = np.where(is_light, 1.5, 1.0)[:, None, None, None]
    return np.clip(frames * gain + (gain - 1) * 40, 0, 255).astype(np.uint8)
