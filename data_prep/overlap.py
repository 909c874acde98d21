"""Videos and captions that several splits, or several videos, have."""

import collections
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from data_prep.annotations import Annotations, Captioned


def used_together(
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
    shared = {}
    for one, other in used_together(annotations, protocols):
        ids = {entry.video_id for entry in annotations.splits[other]}
        both = {entry.video_id: entry for entry in annotations.splits[one] if entry.video_id in ids}
        if both:
            same = sum(
                len(_texts(both[entry.video_id]) & _texts(entry))
                for entry in annotations.splits[other]
                if entry.video_id in both
            )
            shared[f"{one} and {other}"] = {"videos": list(both), "captions": same}
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
        for one, other in used_together(annotations, protocols)
    }
    return {splits: count for splits, count in counts.items() if count}


def repeated_captions(annotations: Annotations) -> dict[str, int]:
    """Number of captions of each split that several of its videos have (ambiguous queries)."""
    repeated = {}
    for name, captioned in annotations.splits.items():
        video_counts = collections.Counter(text for entry in captioned for text in _texts(entry))
        if count := sum(1 for videos in video_counts.values() if videos > 1):
            repeated[name] = count
    return repeated


def equal_captions(annotations: Annotations) -> dict[str, str]:
    """The caption that all videos of a split have, for splits of several videos."""
    equal = {}
    for name, captioned in annotations.splits.items():
        texts = (text for entry in captioned for text in _texts(entry))
        first = next(texts, "")
        if len(captioned) > 1 and all(text == first for text in texts):
            equal[name] = captioned[0].captions[0]
    return equal


def warnings(
    annotations: Annotations, merged: Mapping[str, str], protocols: Sequence[Collection[str]]
) -> list[str]:
    """What a user should know before a build, a line for each.

    Args:
      annotations: of the dataset.
      merged: for each other name of a file, the one that is kept.
      protocols: groups of splits that are used together; empty: all are.
    """
    lines = [
        f"{len(found['videos'])} videos are in both {splits}, with {found['captions']} equal"
        f" captions (the first: {found['videos'][0]}): results on one of them are too good"
        for splits, found in shared_videos(annotations, protocols).items()
    ]
    if merged:
        other, name = next(iter(merged.items()))
        lines.append(
            f"{len(merged)} names are other names of the same file and span, and their captions are"
            f" those of one video (the first: {other!r} is {name!r})"
        )
    return lines + [
        f"all captions of {split} are equal ({caption!r}): they tell no video from another"
        for split, caption in equal_captions(annotations).items()
    ]


def _texts(entry: Captioned) -> set[str]:
    return set(map(_normalise, entry.captions))


def _normalise(caption: str) -> str:
    return " ".join(caption.lower().split())
