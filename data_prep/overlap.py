"""Videos and captions that several splits, or several videos, have."""

import collections
import itertools
from collections.abc import Collection, Sequence
from typing import Any

from data_prep.annotations import Annotations


def _used_together(
    annotations: Annotations, protocols: Sequence[Collection[str]]
) -> list[tuple[str, str]]:
    """Pairs of splits of a protocol; those of different ones share videos by design."""
    return [
        pair
        for pair in itertools.combinations(annotations.splits, 2)
        if not protocols or any(set(pair) <= set(protocol) for protocol in protocols)
    ]


def shared_videos(
    annotations: Annotations, protocols: Sequence[Collection[str]]
) -> dict[str, dict[str, Any]]:
    """Videos that two splits have.

    Args:
      annotations: of the dataset.
      protocols: groups of splits that are used together; empty: all are.

    Returns:
      For each pair of splits ("train and test") with common videos, their ids ("videos") and the
      number of captions that they have in both splits ("captions").
    """
    captions = {
        name: {entry.video_id: set(map(_normalise, entry.captions)) for entry in captioned}
        for name, captioned in annotations.splits.items()
    }
    shared = {}
    for one, other in _used_together(annotations, protocols):
        videos = [video for video in captions[one] if video in captions[other]]
        if videos:
            same = sum(len(captions[one][video] & captions[other][video]) for video in videos)
            shared[f"{one} and {other}"] = {"videos": videos, "captions": same}
    return shared


def shared_captions(
    annotations: Annotations, protocols: Sequence[Collection[str]]
) -> dict[str, int]:
    """Number of common captions for each pair of splits that has some; see `shared_videos`."""
    captions = {
        name: {_normalise(text) for entry in captioned for text in entry.captions}
        for name, captioned in annotations.splits.items()
    }
    counts = {
        f"{one} and {other}": len(captions[one] & captions[other])
        for one, other in _used_together(annotations, protocols)
    }
    return {splits: count for splits, count in counts.items() if count}


def repeated_captions(annotations: Annotations) -> dict[str, int]:
    """Number of captions of each split that several of its videos have (ambiguous queries)."""
    repeated = {}
    for name, captioned in annotations.splits.items():
        video_counts = collections.Counter(
            text for entry in captioned for text in {_normalise(text) for text in entry.captions}
        )
        if count := sum(1 for videos in video_counts.values() if videos > 1):
            repeated[name] = count
    return repeated


def _normalise(caption: str) -> str:
    return " ".join(caption.lower().split())
