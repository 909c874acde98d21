"""Finds the same pictures by hashes of sampled frames: duplicates, and the film of a picture."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from drl_jax.search.open_index import IndexedVideo, OpenIndex
from drl_jax.search.reading import MIRRORED, picture_hash

# Bits in which hashes of one picture differ at most: 7 of all frames of real clips that are
# compressed at crf 38, halved and mirrored; frames of different clips differ in 15 or more.
_BITS = 8
# Mean bits up to which no thumbnails are compared; the side in pixels to which they are scaled, and
# their correlation at least: 0.92 of these frames, 0.84 of different clips at most.
_BOX = Image.Resampling.BOX
_CLEAR, _SIDE, _CORRELATION = 3, 24, 0.88
# Videos show the same if all frames of the shorter one are in the other, or this share and one
# more: a file that is compressed again may have other cuts, and then other frames are sampled.
_SHARE = 0.4
# Frames of the shorter one that are compared, and videos that a picture is compared with, at most.
_FRAMES, _VIDEOS = 500, 100
# Neighbours in the order of hashes that are compared, and bits by which this order is rotated.
_NEIGHBOURS, _ROTATION = 16, 8


class Duplicate(NamedTuple):
    """Paths of two videos, and the share of the shorter one's sampled frames in the other."""

    first: str
    second: str
    share: float
    is_mirrored: bool


def find_duplicates(index: OpenIndex) -> list[Duplicate]:
    """Finds pairs of videos of which one shows what the other does, or a part of it, by path.

    Of many copies not all pairs are found, but each is in one.
    """
    frames = _sampled_frames(index)
    found, places = _find_pairs(index, frames), frames.places
    paths = {n: index.path_of(places[n]) for pair in found for n in pair}
    return sorted(
        Duplicate(*sorted((paths[a], paths[b])), share=share, is_mirrored=not is_direct)
        for (a, b), (share, is_direct) in found.items()
    )


def same_moments(index: OpenIndex, parts: Sequence[tuple[IndexedVideo, float, float]]) -> list[int]:
    """For each part of a video, seconds, the number of the first that shows the same, in order."""
    if not parts:
        return []
    hashes, starts, counts = [], [], []
    for video, start, end in parts:
        # The frames that are seen in it.
        first = max(0, int(np.searchsorted(video.times, start, side="right")) - 1)
        last = max(first + 1, int(np.searchsorted(video.times, end)))
        hashes.append(video.record.arrays["frame.hash"][first:last])
        starts.append(first)
        counts.append(last - first)
    places = [index.place(video.slot) for video, *_ in parts]
    firsts = np.cumsum([0, *counts])
    frames = _Frames(np.concatenate(hashes), firsts, places, starts)
    pairs = _find_pairs(index, frames, in_order=True)
    same = list(range(len(parts)))
    for one, other in sorted(pairs):  # What is like a later one is like the first of these, too.
        same[other] = min(same[other], same[one])
    return same


class _Frames(NamedTuple):
    """Hashes uint64 [N] of parts of videos, the first of each [V + 1], and where these are."""

    hashes: np.ndarray
    firsts: np.ndarray
    places: list[tuple[int, int]]
    starts: Sequence[int]  # Number of the first frame in its video.


def _find_pairs(
    index: OpenIndex, frames: _Frames, *, in_order: bool = False
) -> dict[tuple[int, int], tuple[float, bool]]:
    """Pairs of parts that show the same: the share of the shorter one, and whether not mirrored."""
    hashes, firsts, places, starts = frames
    counts, found = np.diff(firsts), {}
    for one, other, is_mirrored in _candidates(hashes, counts):
        short, long = sorted((one, other), key=lambda n: counts[n])
        chosen = np.linspace(0, counts[short] - 1, min(counts[short], _FRAMES), dtype=int)
        shown = chosen[hashes[firsts[short] + chosen] != 0]
        mask = MIRRORED if is_mirrored else np.uint64(0)
        row = hashes[firsts[long] : firsts[long + 1]]
        bits = np.bitwise_count((hashes[firsts[short] + shown] ^ mask)[:, None] ^ row)
        is_equal = bits.min(axis=1) <= _BITS
        equal, nearest = bits.min(axis=1)[is_equal], bits.argmin(axis=1)[is_equal]
        most = max(len(shown), len(chosen) / 2)  # A title between black frames is not the video.
        if len(equal) < min(most, _SHARE * most + 1):
            continue
        if in_order and nearest[0] > nearest[-1]:  # Played backwards.
            continue
        if equal.mean() > _CLEAR:
            a, b = np.unravel_index(bits.argmin(), bits.shape)
            picture = _thumbnail(index, places[short], starts[short] + shown[a])
            if is_mirrored:
                picture = ImageOps.mirror(picture)
            if not _is_like(_thumbnail(index, places[long], starts[long] + b), picture):
                continue
        how = len(equal) / most, not is_mirrored  # Symmetrical pictures are like both.
        found[one, other] = max(how, found.get((one, other), how))
    return found


def same_picture(index: OpenIndex, picture: np.ndarray) -> list[IndexedVideo]:
    """The videos of which a picture, uint8 [S, S, 3], is a sampled frame, the most alike first."""
    found: dict[tuple[int, int], tuple[int, int]] = {}  # The best frame of each video.
    wanted, shown = picture_hash(picture), Image.fromarray(picture)
    for number, one in enumerate(index.segments):
        if not (one.live.any() and wanted):  # A plain picture is in no video.
            continue
        firsts, hashes = one.segment.firsts["frame"], one.segment.arrays["frame.hash"]
        bits = np.bitwise_count(hashes ^ wanted)
        near = np.flatnonzero(bits <= _BITS)
        rows = np.searchsorted(firsts, near, side="right") - 1
        is_live = one.live[rows]
        for row, frame in zip(rows[is_live].tolist(), near[is_live].tolist(), strict=True):
            better = int(bits[frame]), frame - int(firsts[row])
            found[number, row] = min(better, found.get((number, row), better))
    best = sorted(found, key=found.__getitem__)[:_VIDEOS]
    same = [p for p in best if _is_like(_thumbnail(index, p, found[p][1]), shown)]
    return [index.video(*place) for place in same]


def _thumbnail(index: OpenIndex, place: tuple[int, int], frame: int) -> Image.Image:
    return Image.open(io.BytesIO(index.video(*place).thumbnails([int(frame)])))


def _is_like(thumbnail: Image.Image, picture: Image.Image) -> bool:
    scaled = [one.convert("L").resize((_SIDE, _SIDE), _BOX) for one in (thumbnail, picture)]
    levels = [np.asarray(one, np.float64).ravel() for one in scaled]
    return np.corrcoef(*levels)[0, 1] >= _CORRELATION


def _sampled_frames(index: OpenIndex) -> _Frames:
    """All frames of all videos."""
    hashes, counts, places = [], [np.zeros(1, int)], []
    for number, one in enumerate(index.segments):
        if one.live.any():
            frames = np.diff(one.segment.firsts["frame"])
            hashes.append(one.segment.arrays["frame.hash"][np.repeat(one.live, frames)])
            counts.append(frames[one.live])
            places += [(number, row) for row in np.flatnonzero(one.live).tolist()]
    firsts = np.cumsum(np.concatenate(counts))
    return _Frames(np.concatenate(hashes), firsts, places, [0] * len(places))


def _candidates(hashes: np.ndarray, counts: np.ndarray) -> list[tuple[int, int, int]]:
    """Most pairs of videos with a like frame, and whether it is mirrored.

    Like hashes begin with the same bits in most rotations, and are neighbours in their order.
    """
    owners = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((hashes, owners))
    hashes, owners = hashes[order], owners[order]
    # Each picture of a video once.
    is_new = (np.diff(hashes, prepend=0) != 0) | (np.diff(owners, prepend=-1) != 0)
    hashes, owners = hashes[is_new & (hashes != 0)], owners[is_new & (hashes != 0)]
    hashes, owners = np.concatenate([hashes, hashes ^ MIRRORED]), np.tile(owners, 2)
    found = np.zeros((0, 3), np.int64)
    for turn in range(0, 64, _ROTATION):
        turned = hashes << np.uint64(turn) | hashes >> np.uint64(-turn % 64)
        order = np.argsort(turned, kind="stable")
        turned, videos, is_mirrored = turned[order], owners[order], order >= len(order) // 2
        for step in range(1, _NEIGHBOURS + 1):
            is_near = np.bitwise_count(turned[step:] ^ turned[:-step]) <= _BITS
            rows = np.flatnonzero(is_near & (videos[step:] != videos[:-step]))
            pairs = np.sort([videos[rows], videos[rows + step]], axis=0)
            is_odd = is_mirrored[rows] != is_mirrored[rows + step]
            found = np.concatenate([found, np.column_stack([*pairs, is_odd])])
        found = np.unique(found, axis=0)
    return found.tolist()
