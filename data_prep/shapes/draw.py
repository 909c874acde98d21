"""Draws a scene as frames and writes them as a real H.264 file."""

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from data_prep.shapes.scenes import MovingShape, Scene

SIZE = 64  # pixels a side
FPS = 4
SECONDS = 3
# One frame more than SECONDS * FPS, so that sampling one frame a second takes the first and the
# last: a reversed clip gives the same frames in reverse order.
FRAMES = SECONDS * FPS + 1
_SUPERSAMPLE = 4
_COLOURS = {
    "red": (225, 50, 45),
    "green": (45, 190, 70),
    "blue": (60, 95, 240),
    "yellow": (240, 215, 50),
    "white": (245, 245, 245),
}

# (x, y, radius) at each frame, in pixels.
Track = list[tuple[float, float, float]]


def draw_clip(scene: Scene, seed: int) -> list[np.ndarray]:
    """The frames of a clip.

    Args:
      scene: what to draw.
      seed: fixes places, sizes, background; a scene and its reverse give, with one seed, the same
        frames in reverse order.

    Returns:
      FRAMES arrays uint8 [SIZE, SIZE, 3].
    """
    # Of a scene and its reverse, the lesser is drawn; the other is that one played backwards.
    forward = min(scene, scene.reversed())
    rng = random.Random(seed)
    background = tuple(rng.randint(10, 60) for _ in range(3))
    # Of a few placements, the one in which the shapes overlap least.
    first, second = max(
        ([_track(shape, rng) for shape in (forward.first, forward.second)] for _ in range(8)),
        key=lambda tracks: _least_gap(*tracks),
    )
    looks = (forward.first, forward.second)
    frames = [
        _draw_frame(background, zip(looks, places, strict=True))
        for places in zip(first, second, strict=True)
    ]
    return frames if scene == forward else frames[::-1]


def _track(shape: MovingShape, rng: random.Random) -> Track:
    """Where the shape is and how big, frame by frame.

    A motion and its reverse draw from the same positions: a single frame never tells the direction.
    """
    radius = rng.uniform(6.5, 8.5)
    low, high = radius + 1, SIZE - radius - 1
    if shape.motion in ("grow", "shrink"):
        small, big = rng.uniform(4, 5.5), rng.uniform(10.5, 12)
        x, y = (rng.uniform(big + 1, SIZE - big - 1) for _ in range(2))
        track = [(x, y, small + (big - small) * t) for t in _times()]
        return track if shape.motion == "grow" else track[::-1]
    x, y = (rng.uniform(low, high) for _ in range(2))
    if shape.motion == "still":
        return [(x, y, radius)] * FRAMES
    if shape.motion == "swing":
        # There and back twice, from rest to rest: the same backwards.
        reach = rng.uniform(10, 14)
        x = rng.uniform(low + reach, high - reach)
        return [(x + reach * math.cos(4 * math.pi * t), y, radius) for t in _times()]
    span = rng.uniform(0.65, 1.0) * (high - low)
    start = rng.uniform(low, high - span)
    along = [start + span * t for t in _times()]
    if shape.motion in ("left", "up"):
        along.reverse()
    if shape.motion in ("right", "left"):
        return [(position, y, radius) for position in along]
    return [(x, position, radius) for position in along]


def _times() -> Iterator[float]:
    return (frame / (FRAMES - 1) for frame in range(FRAMES))


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
        elif look.shape == "square":
            side = radius * 0.88
            canvas.rectangle((x - side, y - side, x + side, y + side), fill=colour)
        else:
            corners = {"triangle": _polygon(3), "star": _polygon(5, inner=0.42)}[look.shape]
            scale = radius * 1.2
            canvas.polygon([(x + scale * dx, y + scale * dy) for dx, dy in corners], fill=colour)
    return np.asarray(image.reduce(_SUPERSAMPLE))


def _polygon(points: int, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners on the unit circle, the first on top; with `inner`, notches between them (a star)."""
    radii = [1.0] if inner is None else [1.0, inner]
    steps = points * len(radii)
    return [
        (
            radii[k % len(radii)] * math.sin(2 * math.pi * k / steps),
            -radii[k % len(radii)] * math.cos(2 * math.pi * k / steps),
        )
        for k in range(steps)
    ]


def write_mp4(path: Path, frames: list[np.ndarray]) -> None:
    """Writes frames as H.264 in mp4, lossless after the conversion to yuv420p.

    Lossless, because a clip and its reverse must decode to the same frames; a lossy encoder would
    leave its own traces of time in them.
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
