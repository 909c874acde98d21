"""What a similarity matrix says about single captions and videos, in NumPy.

Shapes: A captions, B videos. `sim_matrix` is float [A, B]; `text_to_video` is int [A], the column
of each caption's video.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Candidates of a caption that count as found.
_FIRST = 10
# Captions that are sorted at a time.
_BLOCK = 1024


class WrongQuery(NamedTuple):
    """A caption that does not find its video first."""

    caption: int  # its row
    video: int  # the column of its video
    rank: float  # of its video
    score: float  # its similarity to its video
    returned: int  # the column of the most similar other video
    returned_score: float  # its similarity to that


class ConfusedPair(NamedTuple):
    """Two videos of which captions of one prefer the other."""

    videos: tuple[int, int]  # their columns
    captions: list[int]  # those of both that are at least as similar to the other video
    of: int  # number of captions of both
    margin: float  # largest amount by which such a caption prefers the other video


class Hubness(NamedTuple):
    """How often each video is among the first k of a caption."""

    k: int
    occurrences: np.ndarray  # int [B], number of captions that have the video among their first k
    first: np.ndarray  # int [B], number of captions that have it first
    hubs: list[int]  # columns of the videos with the most occurrences, most first
    expected: float  # mean of the occurrences, which all videos would have without hubs
    skewness: float  # of them (Radovanovic et al., JMLR 11, 2010): large with hubs


class Duplicate(NamedTuple):
    """A caption that several videos have."""

    caption: str  # as the first of them has it
    captions: list[int]  # its rows
    videos: list[int]  # their columns


def worst_queries(
    sim_matrix: np.ndarray, text_to_video: np.ndarray, ranks: np.ndarray, count: int
) -> list[WrongQuery]:
    """At most `count` captions with the largest `ranks` of their videos above 1, largest first."""
    rows = np.arange(len(ranks))
    own = sim_matrix[rows, text_to_video]
    others = sim_matrix.copy()
    others[rows, text_to_video] = -np.inf
    returned = others.argmax(axis=1)
    scores = sim_matrix[rows, returned]
    order = np.lexsort((own - scores, -ranks))[:count]
    columns = (rows, text_to_video, ranks, own, returned, scores)
    wrong = (column[order[ranks[order] > 1]].tolist() for column in columns)
    return list(map(WrongQuery, *wrong))


def confused_pairs(
    sim_matrix: np.ndarray, text_to_video: np.ndarray, count: int
) -> list[ConfusedPair]:
    """The pairs of videos with the largest share of captions that prefer the other one.

    It counts if it is among the first ten of the caption. Of equal shares, the largest margin is
    first.
    """
    rows = np.arange(len(text_to_video))
    own = sim_matrix[rows, text_to_video]
    candidates = _first_candidates(sim_matrix, _FIRST)
    scores = np.take_along_axis(sim_matrix, candidates, axis=1)
    preferred = (scores >= own[:, None]) & (candidates != text_to_video[:, None])
    captions, columns = np.nonzero(preferred)[0], candidates[preferred]
    videos = text_to_video[captions]
    low, high = np.minimum(videos, columns), np.maximum(videos, columns)
    margins = sim_matrix[captions, columns] - own[captions]
    keys, index = np.unique(low * sim_matrix.shape[1] + high, return_inverse=True)
    wrong = np.bincount(index, minlength=len(keys))
    largest = np.full(len(keys), -np.inf)
    np.maximum.at(largest, index, margins)
    captions_of = np.bincount(text_to_video, minlength=sim_matrix.shape[1])
    one, two = np.divmod(keys, sim_matrix.shape[1])
    total = captions_of[one] + captions_of[two]
    order = np.lexsort((-largest, -wrong / np.maximum(total, 1)))[:count]
    return [
        ConfusedPair(
            (int(one[pair]), int(two[pair])),
            captions[index == pair].tolist(),
            int(total[pair]),
            float(largest[pair]),
        )
        for pair in order.tolist()
    ]


def hubness(sim_matrix: np.ndarray, count: int) -> Hubness:
    """Counts how often each video is returned; k is 10, or a tenth of a small gallery.

    Of equal similarities, earlier columns are first. There are `count` hubs.
    """
    videos = sim_matrix.shape[1]
    k = min(_FIRST, -(-videos // 10))
    best = _first_candidates(sim_matrix, k)
    occurrences = np.bincount(best.ravel(), minlength=videos)
    first = np.bincount(best[:, 0], minlength=videos)
    hubs = np.lexsort((-first, -occurrences))[:count].tolist()
    mean, deviation = float(occurrences.mean()), float(occurrences.std())
    skewness = float(((occurrences - mean) ** 3).mean()) / deviation**3 if deviation else 0.0
    return Hubness(k, occurrences, first, hubs, mean, skewness)


def _first_candidates(sim_matrix: np.ndarray, count: int) -> np.ndarray:
    """The most similar videos of each caption, best first: int [A, count] or fewer columns."""
    starts = range(0, len(sim_matrix), _BLOCK)
    orders = (np.argsort(-sim_matrix[n : n + _BLOCK], axis=1, kind="stable") for n in starts)
    return np.concatenate([order[:, :count] for order in orders])


def duplicate_captions(captions: Sequence[str], text_to_video: np.ndarray) -> list[Duplicate]:
    """Captions of several videos, the most frequent first; case and white space do not count."""
    rows: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        rows.setdefault(" ".join(caption.casefold().split()), []).append(row)
    found = []
    for same in rows.values():
        videos = list(dict.fromkeys(int(text_to_video[row]) for row in same))
        if len(videos) > 1:
            found.append(Duplicate(captions[same[0]], same, videos))
    return sorted(found, key=lambda duplicate: -len(duplicate.videos))


def rank_shares(ranks: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Percentage of ranks in each of a few bins: names of the bins, float [bins].

    A rank between two whole numbers, of a tie, counts for the larger one.
    """
    edges = [1, 2, 5, 10, 20, 50, 100]
    names = ["1", "2", "3-5", "6-10", "11-20", "21-50", "51-100", ">100"]
    counts = np.bincount(np.searchsorted(edges, np.ceil(ranks)), minlength=len(names))
    return names, 100 * counts / len(ranks)
