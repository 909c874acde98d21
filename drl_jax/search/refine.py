"""Windows that are made at query time, from the stored features of single frames.

The windows of an index start every few seconds, and find candidates. Around each candidate there
are windows that start at every sampled frame; a fixed number of them goes through the temporal head
and the interaction, and the best one gives the candidate its score and its span. They all have the
pace of training and the same number of frames: the scores of windows of different lengths cannot be
compared, because a padded window has the floor 0 in its maxima.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drl_jax.models.interactions import Features, Interaction
from drl_jax.models.interactions.base import unit_features
from drl_jax.pretrained.model import RetrievalModel
from drl_jax.search import REFINE
from drl_jax.search.encoding import bank_similarity, float32_of
from drl_jax.search.engine import Part
from drl_jax.search.windows import Window, inner_windows, windows_around

# Windows of one candidate that a query encodes, at most. More candidates find more than more
# windows of each do.
_PER_CANDIDATE = 4
# By how many deviations of the bank a shorter window has to be more unusual than the winner.
_CLEARLY = 0.25


class Film(NamedTuple):
    """What an index stores of a file of several windows, by their start, and F sampled frames."""

    times: np.ndarray  # float64 [F], seconds.
    windows: Sequence[Window]
    image_feat: np.ndarray  # [F, D] before the temporal head: float32, or bits of bfloat16.


class Candidate(NamedTuple):
    """A stored window that scores well: its index, and its similarity."""

    film: Film
    window: int
    score: float


def score_windows(
    model: RetrievalModel, parts: Sequence[Part], windows: Features, pad: int = 1
) -> np.ndarray:
    """Compares a query with W windows (`encode`), filled up to a multiple of `pad`: float32 [W]."""
    count = len(next(iter(windows.values())))
    rows = np.minimum(np.arange(-(-count // pad) * pad), count - 1)
    padded = {name: array[rows] for name, array in windows.items()}
    scores = np.zeros(count, np.float32)
    for part in parts:
        similarity = model.similarity(part.text, padded)[:, :count]
        scores += np.float32(part.weight) * similarity.max(axis=0)
    return scores


def refine(
    model: RetrievalModel,
    parts: Sequence[Part],
    candidates: Sequence[Candidate],
    most: int = REFINE,
) -> list[tuple[Window, float]]:
    """Finds the best window at each candidate of a query, and its similarity.

    What a candidate becomes depends on its film alone. `most` windows are encoded, from the first
    candidate on; those for which none is left keep their window and score. No score gets lower.
    """
    refined = [(film.windows[window], score) for film, window, score in candidates]
    proposed: list[tuple[int, Window]] = []
    for number, (film, window, score) in enumerate(candidates):
        around = windows_around(film.times, film.windows, window, model.config.data.max_frames)
        stored = [new for new in around if new.frames == film.windows[window].frames]
        if stored:  # With the span of a refined window, and its score is known.
            around.remove(stored[0])
            refined[number] = stored[0], score
        around = _promising(model.interaction, parts, film, around)
        if len(proposed) + len(around) > most:
            break
        proposed += [(number, new) for new in around]
    if proposed:
        features = encode(model, [(candidates[number].film, window) for number, window in proposed])
        scores = score_windows(model, parts, features, most).tolist()
        for (number, window), score in zip(proposed, scores, strict=True):
            refined[number] = max(refined[number], (window, score), key=lambda found: found[1])
    return refined


def tighten(
    model: RetrievalModel, parts: Sequence[Part], bank: Features, film: Film, window: Window
) -> Window:
    """Moves the start and the end of the best window of a sentence inside it.

    Windows of other lengths are compared by how unusual the score is among those of the same window
    with the captions of the bank (`encode_text`). A window that is a whole shot stays as it is.
    """
    windows = [window, *inner_windows(film.times, window, model.config.data.max_frames)]
    if len(windows) == 1 or window in film.windows:
        return window
    features = encode(model, [(film, part) for part in windows])
    mean, deviation = bank_similarity(model, bank, features).T
    unusual = (score_windows(model, parts, features) - mean) / np.maximum(deviation, 1e-6)
    unusual[0] += _CLEARLY
    return windows[int(unusual.argmax())]


def encode(model: RetrievalModel, windows: Sequence[tuple[Film, Window]]) -> Features:
    """Arrays of W windows of any films, from the features of their frames."""
    rows = [float32_of(film.image_feat[list(window.frames)]) for film, window in windows]
    frames = np.split(np.arange(sum(map(len, rows))), np.cumsum([len(part) for part in rows])[:-1])
    return model.encode_frame_windows(np.concatenate(rows), frames)


def _promising(
    interaction: type[Interaction], parts: Sequence[Part], film: Film, windows: list[Window]
) -> list[Window]:
    """The windows to encode: the most similar by single frames, or evenly spread ones."""
    if len(windows) <= _PER_CANDIDATE:
        return windows
    if not interaction.HAS_VECTORS:
        chosen = np.linspace(0, len(windows) - 1, _PER_CANDIDATE, dtype=int)
        return [windows[number] for number in chosen]
    rows = np.array([window.frames for window in windows])  # [W, F]
    feat = float32_of(film.image_feat[rows.min() : rows.max() + 1])
    unit = unit_features({"frame_feat": feat}, "frame")
    of_frames = sum(
        part.weight * (interaction.query_vectors(part.text) @ unit.T).max(axis=0) for part in parts
    )
    promise = of_frames[rows - rows.min()].mean(axis=1)
    best = np.argsort(-promise, kind="stable")[:_PER_CANDIDATE]
    return [windows[number] for number in np.sort(best)]
