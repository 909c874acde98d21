"""Draws scenes and stills as frames, and writes H.264 files; worker processes import it."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from data_prep.shapes.events import EventClip
from data_prep.shapes.scenes import MovingShape, Scene
from data_prep.shapes.stills import COLUMNS, ROWS, PlacedShape, Still
from drl_jax.runtime.files import replacing

SIZE = 64  # side of a frame, pixels
FPS = 4
SECONDS = 3
# One frame more than SECONDS * FPS, so that sampling at 1 frame per second includes the first and
# the last frame: a reversed clip then gives the same frames in reverse order.
FRAMES = SECONDS * FPS + 1
# Of a clip of events, each one picture: three gestures, and a rest before and after each.
EVENT_SECONDS = 8
# As many seconds for either count, so that single frames do not tell it. With random ones, a short
# training learns nothing about it.
_COUNTED_SECONDS = {2: ((1, 2, 5), (1, 4, 5)), 3: ((1, 3, 5),)}
_SUPERSAMPLE = 4
_COLOURS = {
    "red": (225, 50, 45),
    "green": (45, 190, 70),
    "blue": (60, 95, 240),
    "yellow": (240, 215, 50),
    "white": (245, 245, 245),
}

# Corners of a triangle on the unit circle, the first at the top.
_TRIANGLE = [(math.sin(2 * math.pi * k / 3), -math.cos(2 * math.pi * k / 3)) for k in range(3)]
# Range of radii, pixels.
_RADII = {"small": (5, 6.5), "medium": (8, 10), "big": (12, 14)}
# (x, y, radius) at each frame, in pixels.
Track = list[tuple[float, float, float]]


def draw_clip(scene: Scene, seed: int) -> list[np.ndarray]:
    """Draws the frames of a clip: FRAMES arrays uint8 [SIZE, SIZE, 3].

    The seed determines positions, sizes and background. With the same seed, a scene and its reverse
    give the same frames in opposite order.
    """
    # Only the smaller of a scene and its reverse is drawn; the other is its time reversal.
    forward = min(scene, scene.reversed())
    rng = random.Random(seed)
    background = _background(rng)
    first, second = _least_overlapping(_track, (forward.first, forward.second), rng)
    looks = (forward.first, forward.second)
    frames = [
        _draw_frame(background, zip(looks, places, strict=True))
        for places in zip(first, second, strict=True)
    ]
    return frames if scene == forward else frames[::-1]


def draw_still(still: Still, seed: int) -> list[np.ndarray]:
    """Draws a still: one array uint8 [SIZE, SIZE, 3]. The seed is as in `draw_clip`."""
    rng = random.Random(seed)
    background = _background(rng)
    shapes = (still.first, still.second)
    (first,), (second,) = _least_overlapping(_place, shapes, rng)
    return [_draw_frame(background, zip(shapes, (first, second), strict=True))]


def draw_event_clip(clip: EventClip, seed: int) -> list[np.ndarray]:
    """Draws the frames of a clip of events: FPS * EVENT_SECONDS arrays, as `draw_clip`.

    With the same seed, a clip and its counterpart give the same pictures in another order.
    """
    # The counterpart has another count, or is the time reversal.
    forward = clip if clip.kind == "count" else min(clip, clip.counterpart())
    times = dict(zip(forward.shapes, _event_times(forward, random.Random(f"{seed}")), strict=True))
    rng = random.Random(seed)
    background = _background(rng)

    def place(shape: MovingShape, rng: random.Random) -> Track:
        if clip.kind == "binding":
            return _track(shape, rng, EVENT_SECONDS)
        rest, gesture = _gesture(shape, rng)
        return [gesture if second in times[shape] else rest for second in range(EVENT_SECONDS)]

    places = zip(*_least_overlapping(place, forward.shapes, rng, tries=32), strict=True)
    pictures = [_draw_frame(background, zip(forward.shapes, at, strict=True)) for at in places]
    return [picture for picture in pictures[:: 1 if clip == forward else -1] for _ in range(FPS)]


def _event_times(clip: EventClip, rng: random.Random) -> tuple[Sequence[int], Sequence[int]]:
    """The seconds in which each shape of a clip makes its gesture."""
    if clip.kind == "count":
        return rng.choice(_COUNTED_SECONDS[clip.count]), ()
    # In either half, one to three seconds.
    runs = [range(*bounds) for bounds in itertools.combinations(range(EVENT_SECONDS // 2 + 1), 2)]
    first, second = rng.choices([run for run in runs if len(run) <= 3], k=2)
    return first, range(EVENT_SECONDS - second.stop, EVENT_SECONDS - second.start)


def _background(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(10, 60) for _ in range(3))


def _least_overlapping(
    place: Callable[[Any, random.Random], Track],
    shapes: tuple[Any, Any],
    rng: random.Random,
    tries: int = 16,
) -> list[Track]:
    """Of some random placements of two shapes, the one in which they overlap least."""
    placements = ([place(shape, rng) for shape in shapes] for _ in range(tries))
    return max(placements, key=lambda tracks: _least_gap(*tracks))


def _place(shape: PlacedShape, rng: random.Random) -> Track:
    """Position and radius of a shape of a still, in its third of the image in both directions."""
    radius = rng.uniform(*_RADII[shape.size])

    def within(third: int) -> float:
        margin = SIZE / 48  # A shape on the border of two places would fit both.
        low, high = third * SIZE / 3 + margin, (third + 1) * SIZE / 3 - margin
        return rng.uniform(max(low, radius + 1), min(high, SIZE - radius - 1))

    return [(within(COLUMNS.index(shape.column)), within(ROWS.index(shape.row)), radius)]


def _gesture(shape: MovingShape, rng: random.Random) -> Track:
    """Position and radius of a shape at rest and in its gesture, if it makes one."""
    radius, big, reach = (rng.uniform(*r) for r in (_RADII["medium"], _RADII["big"], (14, 18)))
    x = rng.uniform(big + 1, SIZE - big - 1)
    y = rng.uniform(radius + reach + 1, SIZE - big - 1)
    gestures = {
        "hop": (x, y - reach, radius),
        "swell": (x, y, big),
        "blink": (-SIZE, y, radius),  # outside the frame
    }
    return [(x, y, radius), gestures.get(shape.motion, (x, y, radius))]


def _track(shape: MovingShape, rng: random.Random, frames: int = FRAMES) -> Track:
    """Position and radius of a shape in each frame.

    A motion and its reverse have the same distribution of positions, so a single frame does not
    show the direction.
    """
    radius = rng.uniform(*_RADII["medium"])
    low, high = radius + 1, SIZE - radius - 1
    if shape.motion in ("grow", "shrink"):
        small, big = rng.uniform(*_RADII["small"]), rng.uniform(*_RADII["big"])
        x, y = (rng.uniform(big + 1, SIZE - big - 1) for _ in range(2))
        track = [(x, y, small + (big - small) * t) for t in _times(frames)]
        return track if shape.motion == "grow" else track[::-1]
    x, y = (rng.uniform(low, high) for _ in range(2))
    if shape.motion == "still":
        return [(x, y, radius)] * frames
    if shape.motion == "swing":
        # Two full periods, starting and ending at rest: symmetric in time.
        reach = rng.uniform(10, 14)
        x = rng.uniform(low + reach, high - reach)
        return [(x + reach * math.cos(4 * math.pi * t), y, radius) for t in _times(frames)]
    span = rng.uniform(0.65, 1.0) * (high - low)
    start = rng.uniform(low, high - span)
    along = [start + span * t for t in _times(frames)]
    if shape.motion in ("left", "up"):
        along.reverse()
    if shape.motion in ("right", "left"):
        return [(position, y, radius) for position in along]
    return [(x, position, radius) for position in along]


def _times(frames: int) -> Iterator[float]:
    return (frame / (frames - 1) for frame in range(frames))


def _least_gap(one: Track, other: Track) -> float:
    return min(
        math.hypot(x1 - x2, y1 - y2) - r1 - r2
        for (x1, y1, r1), (x2, y2, r2) in zip(one, other, strict=True)
    )


def _draw_frame(background, placed) -> np.ndarray:
    image = Image.new("RGB", (SIZE * _SUPERSAMPLE,) * 2, background)
    canvas = ImageDraw.Draw(image)
    for look, place in placed:
        x, y, radius = (value * _SUPERSAMPLE for value in place)
        colour = _COLOURS[look.colour]
        if look.shape == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        elif look.shape == "cross":
            long, short = radius, radius / 3
            canvas.rectangle((x - long, y - short, x + long, y + short), fill=colour)
            canvas.rectangle((x - short, y - long, x + short, y + long), fill=colour)
        else:
            scale = radius * 1.2
            corners = [(x + scale * dx, y + scale * dy) for dx, dy in _TRIANGLE]
            canvas.polygon(corners, fill=colour)
    return np.asarray(image.reduce(_SUPERSAMPLE))


def write_mp4(path: Path, frames: list[np.ndarray]) -> None:
    """Writes frames as H.264 in mp4, lossless after the conversion to yuv420p.

    Lossless, because a clip and its reverse must decode to the same frames; artefacts of a lossy
    encoder would depend on the direction of time.
    """
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.thread_count = 1  # byte-identical files on every run
        stream.options = {"qp": "0", "preset": "veryfast", "bf": "0", "g": str(FPS)}
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def draw_file(
    path: Path, draw: Callable[[Any, int], list[np.ndarray]], item: Any, seed: int
) -> None:
    """Writes the frames of `draw(item, seed)` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        write_mp4(unfinished, draw(item, seed))
