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
from drl_jax.pretrained import RetrievalModel
from drl_jax.search.calibration import bank_similarity
from drl_jax.search.windows import Window, inner_windows, windows_around

# Windows that a query encodes, and those of one candidate, at most.
REFINE, _PER_CANDIDATE = 128, 8
# By how many deviations of the bank a shorter window has to be more unusual than the winner.
_CLEARLY = 1.0


class Part(NamedTuple):
    """A part of a query: a sentence, a picture, a video or a moment.

    Attributes:
      text: arrays of Q texts, or of videos in the place of texts. The most similar of them counts;
        Q is 1 but for the windows of a video.
      weight: of its similarity in the score of the query.
    """

    text: Features
    weight: float


class Film(NamedTuple):
    """What an index stores of a file of more than one window.

    Attributes:
      times: float64 [F], of the sampled frames, seconds.
      windows: those that are stored, by their start.
      image_feat: [F, D], features of the frames before the temporal head: float32, or the bits of
        bfloat16 as uint16; may be a memory map.
    """

    times: np.ndarray
    windows: Sequence[Window]
    image_feat: np.ndarray


class Candidate(NamedTuple):
    """A stored window that scores well.

    Attributes:
      film: the file that it is of; None: it has one window, which is not refined.
      window: index of the window among the film's.
      score: of the query, without the bias.
      bias: what was subtracted from the score: a correction for hubs.
    """

    film: Film | None
    window: int
    score: float
    bias: float = 0.0


class Refined(NamedTuple):
    """The best window at a candidate; None: the candidate's own.

    Attributes:
      window: the window.
      score: of the query, without the bias of the candidate.
    """

    window: Window | None
    score: float


def score_windows(
    model: RetrievalModel, parts: Sequence[Part], windows: Features, pad: int = 1
) -> np.ndarray:
    """Compares a query with windows.

    The parts of a query are compared one by one, each with its own length: a padded token takes
    part in the maxima of token-wise interactions.

    Args:
      model: encoded both.
      parts: of the query.
      windows: arrays of W windows (`encode_frame_windows`).
      pad: the number of windows is rounded up to a multiple of it, to compile few shapes.

    Returns:
      float32 [W].
    """
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
) -> list[Refined]:
    """Finds the best window at each of the candidates of a query.

    What a candidate becomes depends on its film alone. The windows are spent from the first
    candidate on; those for which none is left keep their window and score. No score gets lower.

    Args:
      model: of the index.
      parts: of the query.
      candidates: the best first; an order that does not depend on how videos are stored.
      most: number of windows that are encoded, at most.

    Returns:
      One for each candidate.
    """
    proposed: list[tuple[int, Window]] = []
    own: dict[int, Window] = {}
    for number, candidate in enumerate(candidates):
        if candidate.film is None:
            continue
        film, frames = candidate.film, model.config.data.max_frames
        around = windows_around(film.times, film.windows, candidate.window, frames)
        stored = film.windows[candidate.window].frames
        own.update((number, window) for window in around if window.frames == stored)
        around = [window for window in around if window.frames != stored]
        around = _promising(model.interaction, parts, film, around)
        if len(proposed) + len(around) > most:
            break
        proposed += [(number, window) for window in around]
    refined = [
        Refined(own.get(number), candidate.score) for number, candidate in enumerate(candidates)
    ]
    if not proposed:
        return refined
    features = encode(model, [(candidates[number].film, window) for number, window in proposed])
    scores = score_windows(model, parts, features, most)
    for (number, window), score in zip(proposed, scores, strict=True):
        score = float(score) - candidates[number].bias
        if score > refined[number].score:
            refined[number] = Refined(window, score)
    return refined


def tighten(
    model: RetrievalModel, parts: Sequence[Part], bank: Features, film: Film, window: Window
) -> Window:
    """Moves the start and the end of a moment inside it.

    Windows of other lengths are compared by how unusual the query's score is among those of the
    bank's captions with the same window.

    Args:
      model: of the index.
      parts: of the query, a sentence.
      bank: arrays of the captions (`encode_text`).
      film: that the window is of.
      window: a refined window.

    Returns:
      The most unusual part of the window, or the window.
    """
    inside = [window, *inner_windows(film.times, window, model.config.data.max_frames)]
    features = encode(model, [(film, part) for part in inside])
    mean, deviation = bank_similarity(model, bank, features).T
    unusual = (score_windows(model, parts, features) - mean) / np.maximum(deviation, 1e-6)
    best = int(unusual.argmax())
    return inside[best] if unusual[best] > unusual[0] + _CLEARLY else window


def encode(model: RetrievalModel, windows: Sequence[tuple[Film, Window]]) -> Features:
    """Encodes windows of any films from the features of their frames; arrays of W windows."""
    rows = [_float32(film.image_feat[list(window.frames)]) for film, window in windows]
    ends = np.cumsum([len(part) for part in rows])
    frames = [range(end - len(part), end) for part, end in zip(rows, ends, strict=True)]
    return model.encode_frame_windows(np.concatenate(rows), frames)


def _promising(
    interaction: type[Interaction], parts: Sequence[Part], film: Film, windows: list[Window]
) -> list[Window]:
    """The windows to encode: the best by single frames, or evenly spread ones."""
    if len(windows) <= _PER_CANDIDATE:
        return windows
    if not interaction.HAS_VECTORS:
        chosen = np.linspace(0, len(windows) - 1, _PER_CANDIDATE, dtype=int)
        return [windows[number] for number in chosen]
    first = min(window.frames[0] for window in windows)
    last = max(window.frames[-1] for window in windows)
    image_feat = _float32(film.image_feat[first : last + 1])
    unit = unit_features({"frame_feat": image_feat}, "frame")
    rows = np.array([window.frames for window in windows]) - first
    promise = sum(part.weight * _promise(interaction, part.text, unit, rows) for part in parts)
    chosen = np.sort(np.argsort(-promise, kind="stable")[:_PER_CANDIDATE])
    return [windows[number] for number in chosen]


def _promise(
    interaction: type[Interaction], text: Features, unit: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """What single frames say about windows: unit [F, D], rows of frames [W, F] -> [W]."""
    if not interaction.COMPARES_TOKENS:
        return (interaction.query_vectors(text) @ unit.T).max(axis=0)[rows].mean(axis=1)
    found = []
    for tokens, mask, weight in zip(
        text["text_unit"], text["text_mask"], text["text_weight"], strict=True
    ):
        similarity = (unit @ tokens[mask].T)[rows]  # [W, F, L]
        found.append(similarity.max(axis=1) @ weight[mask] + similarity.max(axis=2).mean(axis=1))
    return np.max(found, axis=0)


def _float32(image_feat: np.ndarray) -> np.ndarray:
    if image_feat.dtype == np.uint16:  # The bits of bfloat16, the upper half of a float32.
        return (image_feat.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(image_feat, np.float32)
