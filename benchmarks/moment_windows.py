"""Windows of films that `benchmarks.moments` compares with those of an index."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.hours import Film, read_all
from drl_jax.data.video import count_frames, sample_positions, to_form
from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.search.windows import Window

# Seconds of the windows `fixed_12`, and of the random ones at most.
_LONGEST = 12.0


class Candidates(NamedTuple):
    """Windows of all films of a folder.

    Attributes:
      windows: of each film, by their start.
      features: arrays of the windows of all films, [W, ...] each.
    """

    windows: list[list[Window]]
    features: Features


def other_windows(
    films: Sequence[Film], counts: Sequence[int], rng: np.random.Generator, model: RetrievalModel
) -> dict[str, Candidates]:
    """Encodes windows that know no cuts, or all of them; see `benchmarks.moments`.

    Args:
      films: made of clips of one length.
      counts: number of random windows in each film.
      rng: of the random windows.
      model: encodes them.

    Returns:
      By name: `oracle`, `fixed_clip`, `fixed_12` and `random`.
    """
    windows: dict[str, list[list[Window]]] = {}
    features: dict[str, list[Features]] = {}
    for film, count in zip(films, counts, strict=True):
        # Film by film: the frames of one are in memory.
        frames = np.stack([to_form(frame, model.frame_form) for frame in read_all(film.path)])
        fps = count_frames(film.path)[1]
        kinds = {
            kind: [_window(*span, len(frames), fps, model) for span in spans]
            for kind, spans in _spans(film, len(frames) / fps, count, rng).items()
        }
        every = [window.frames for own in kinds.values() for window in own]
        encoded = model.encode_windows(frames, every)
        first = 0
        for kind, own in kinds.items():
            part = {name: array[first : first + len(own)] for name, array in encoded.items()}
            windows.setdefault(kind, []).append(own)
            features.setdefault(kind, []).append(part)
            first += len(own)
    return {
        kind: Candidates(
            windows[kind],
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        )
        for kind, parts in features.items()
    }


def _spans(
    film: Film, duration: float, count: int, rng: np.random.Generator
) -> dict[str, list[tuple[float, float]]]:
    true = [(part.start, part.end) for part in film.parts]
    clip = true[0][1] - true[0][0]
    lengths = rng.uniform(1, _LONGEST, count)
    starts = rng.uniform(0, 1, count) * (duration - lengths)
    return {
        "oracle": true,
        "fixed_clip": _fixed(clip, duration),
        "fixed_12": _fixed(_LONGEST, duration),
        "random": sorted(zip(starts.tolist(), (starts + lengths).tolist(), strict=True)),
    }


def _fixed(length: float, duration: float) -> list[tuple[float, float]]:
    """Spans of one length, each half over the next."""
    starts = np.arange(0, duration - length + 1e-6, length / 2)
    return [(float(start), float(start + length)) for start in starts]


def _window(start: float, end: float, total: int, fps: float, model: RetrievalModel) -> Window:
    """A window with the frames that a file of its content would have."""
    most = model.config.data.max_frames
    return Window(start, end, tuple(sample_positions(total, fps, most, (start, end))))
