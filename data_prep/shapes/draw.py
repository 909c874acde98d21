"""Draws scenes as frames and writes them as H.264 files. Worker processes import this module."""

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from data_prep.shapes.scenes import MovingShape, Scene
from drl_jax.runtime.files import replacing

SIZE = 64  # side of a frame, pixels
FPS = 4
SECONDS = 3
# One frame more than SECONDS * FPS, so that sampling at 1 frame per second includes the first and
# the last frame: a reversed clip then gives the same frames in reverse order.
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
    """Draws the frames of a clip.

    Args:
      scene: what to draw.
      seed: determines positions, sizes and background. With the same seed, a scene and its reverse
        give the same frames in opposite order.

    Returns:
      FRAMES arrays uint8 [SIZE, SIZE, 3].
    """
    # Only the smaller of a scene and its reverse is drawn; the other is its time reversal.
    forward = min(scene, scene.reversed())
    rng = random.Random(seed)
    background = tuple(rng.randint(10, 60) for _ in range(3))
    # Of 8 random placements, take the one in which the shapes overlap least.
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
    """Position and radius of a shape in each frame.

    A motion and its reverse have the same distribution of positions, so a single frame does not
    show the direction.
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
        # Two full periods, starting and ending at rest: symmetric in time.
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
    """Corners on the unit circle, the first at the top; `inner` is the inner radius of a star."""
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


def draw_file(path: Path, scene: Scene, seed: int) -> None:
    """Draws a clip and writes it atomically; see `draw_clip`."""
    with replacing(path) as unfinished:
        write_mp4(unfinished, draw_clip(scene, seed))
