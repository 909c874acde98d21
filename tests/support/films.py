"""A film of four shots, drawn for tests."""

import numpy as np

from drl_jax.data.frame_form import FrameForm

FPS = 5
# Seconds of the shots of the film; the third is longer than a window.
SHOTS = (4, 1, 20, 6)
FORM = FrameForm(64)


def shot(number: int, seconds: int) -> np.ndarray:
    """A square that moves slowly over a picture of its own colours."""
    rng = np.random.default_rng(number)
    ramp = np.linspace(0, 1, 64)[:, None, None]
    ramp = np.broadcast_to(ramp.swapaxes(0, 1) if number % 2 else ramp, (64, 64, 1))
    picture = (1 - ramp) * rng.integers(0, 256, 3) + ramp * rng.integers(0, 256, 3)
    frames = np.tile(picture, (seconds * FPS, 1, 1, 1)).astype(np.uint8)
    for step, frame in enumerate(frames):
        frame[20:30, step % 50 : step % 50 + 10] = rng.integers(0, 256, 3) if not step else 255
    return frames
