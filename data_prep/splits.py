"""Splits: drawn by file, and what several of them have in common.

What is one file is one video, and in one split, whatever its names are.
"""

import collections
import hashlib
import heapq
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_prep.annotations import AnnotationError, Annotations, Captioned
from data_prep.locations import Clip, file_of

# Without splits, the fraction of files that becomes val, and the fraction that becomes test.
_HELD_OUT = 0.1
# Groups of splits that are used together; empty: all are. Those of different ones share videos by
# design.
Protocols = Sequence[Collection[str]]


def draw_splits(annotations: Annotations, names: Mapping[str, str] | None = None) -> None:
    """Replaces the splits: all videos of a file are in one, which depends on the hash of its name.

    A tenth of the files becomes `val` and a tenth `test`; of fewer than three, none. `names` has
    the name that counts, by id, for the videos of files with several names.
    """

    def name(entry: Captioned) -> str:
        named = names.get(entry.video_id) if names else None
        return named or annotations.sources_of(entry.video_id)[0].file

    entries = list(itertools.chain.from_iterable(annotations.splits.values()))
    files = {name(entry) for entry in entries}
    held_out = math.ceil(len(files) * _HELD_OUT) if len(files) >= 3 else 0
    first = heapq.nsmallest(2 * held_out, files, key=_digest)
    held = {file: "val" if rank < held_out else "test" for rank, file in enumerate(first)}
    annotations.splits, annotations.drawn = {}, True
    for entry in entries:
        annotations.splits.setdefault(held.get(name(entry), "train"), []).append(entry)


def _digest(file: str) -> bytes:
    return hashlib.sha256(file.encode(errors="surrogatepass")).digest()


# ---------------------------------------------------------------- one file, several names


def same_files(clips: Sequence[Clip]) -> list[list[Clip]]:
    """The clips of each file, or of each place in a file, that several ids have.

    Links and hard links are the file that they lead to.
    """
    identities = {}
    for path in {file_of(clip.location): None for clip in clips}:
        try:
            status = path.stat()
            # Some network file systems have no inodes.
            identities[path] = status.st_dev, status.st_ino or path.resolve()
        except OSError:
            identities[path] = path
    places = [getattr(clip.location, "place", None) for clip in clips]
    if None not in places and len(set(identities.values())) == len(identities):
        return []  # Ten million videos in tar files: a place in a file has one id.
    first: dict[object, Clip] = {}
    groups: dict[object, list[Clip]] = {}
    for clip, place in zip(clips, places, strict=True):
        key = identities[file_of(clip.location)], place
        if (other := first.setdefault(key, clip)) is not clip:
            groups.setdefault(key, [other]).append(clip)
    return list(groups.values())


def draw_again(annotations: Annotations, groups: Iterable[Sequence[Clip]]) -> None:
    """Draws the splits again if a file has several names, by the first of them."""
    names = {}
    for group in groups:
        sources = {clip.video_id: annotations.sources_of(clip.video_id)[0].file for clip in group}
        if len(set(sources.values())) > 1:
            names |= dict.fromkeys(sources, min(sources.values()))
    if names:
        draw_splits(annotations, names)


def refuse_shared_files(
    annotations: Annotations, groups: Iterable[Sequence[Clip]], protocols: Protocols
) -> None:
    """Checks that no file is in two splits that are used together under two ids.

    Spans of it that do not overlap may be.
    """
    ids = {clip.video_id for group in groups for clip in group}
    splits = collections.defaultdict(list)
    for name, captioned in annotations.splits.items():
        for entry in captioned:
            if entry.video_id in ids:
                splits[entry.video_id].append(name)
    together = {frozenset(pair) for pair in _used_together(annotations, protocols)}
    shared = []
    for one, other in itertools.chain.from_iterable(map(_overlapping, groups)):
        places = itertools.product(splits[one.video_id], splits[other.video_id])
        if apart := [pair for pair in places if frozenset(pair) in together]:
            shared.append((one, other, apart[0]))
    if shared:
        one, other, pair = shared[0]
        names = [f"{c.video_id!r} of {split}" for c, split in zip((one, other), pair, strict=True)]
        spans = " with spans that overlap" if one.span and other.span else ""
        raise AnnotationError(
            f"{' and '.join(names)} are the same file, {file_of(one.location)},{spans} in different"
            f" splits (pairs of such names: {len(shared)}): give all rows of a file one split, or"
            " spans that do not overlap"
        )


def _overlapping(clips: Iterable[Clip]) -> Iterator[tuple[Clip, Clip]]:
    """Pairs of clips of one file whose spans overlap."""
    spans = [(clip.span or (0.0, math.inf), clip) for clip in clips]
    open_spans: list[tuple[float, Clip]] = []
    for (start, end), clip in sorted(spans, key=lambda item: item[0]):
        open_spans = [(last, other) for last, other in open_spans if last > start]
        yield from ((other, clip) for _, other in open_spans)
        open_spans.append((end, clip))


def merge_names(annotations: Annotations, groups: Iterable[Sequence[Clip]]) -> dict[str, str]:
    """Makes the ids of one file and span one video, with the captions of all.

    Returns the id that stays, for each other id.
    """
    stays = {}
    for group in groups:
        by_span: dict[object, str] = {}
        for clip in group:
            if (video_id := by_span.setdefault(clip.span, clip.video_id)) != clip.video_id:
                stays[clip.video_id] = video_id
    for name, captioned in annotations.splits.items():
        if not any(entry.video_id in stays for entry in captioned):
            continue
        merged: dict[str, Captioned] = {}
        for entry in captioned:
            video_id = stays.get(entry.video_id, entry.video_id)
            if video_id not in merged:
                merged[video_id] = Captioned(video_id, list(entry.captions))
                continue
            known = merged[video_id].captions
            known += [text for text in entry.captions if text not in known]
        annotations.splits[name] = list(merged.values())
    return stays


# ---------------------------------------------------------------- shared videos and captions


def _used_together(annotations: Annotations, protocols: Protocols) -> list[tuple[str, str]]:
    return [
        pair
        for pair in itertools.combinations(annotations.splits, 2)
        if not protocols or any(set(pair) <= set(protocol) for protocol in protocols)
    ]


def shared_videos(annotations: Annotations, protocols: Protocols) -> dict[str, dict[str, Any]]:
    """For each pair of splits ("train and test") with common videos, their ids ("videos") and the
    number of captions that they have in both splits ("captions").
    """
    shared = {}
    for one, other in _used_together(annotations, protocols):
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


def shared_captions(annotations: Annotations, protocols: Protocols) -> dict[str, int]:
    """Number of common captions for each pair of splits that has some; see `shared_videos`."""
    captions = {
        name: set().union(*map(_texts, captioned)) for name, captioned in annotations.splits.items()
    }
    counts = {
        f"{one} and {other}": len(captions[one] & captions[other])
        for one, other in _used_together(annotations, protocols)
    }
    return {splits: count for splits, count in counts.items() if count}


def warnings(
    annotations: Annotations, merged: Mapping[str, str], protocols: Protocols
) -> list[str]:
    """What a user should know before a build, a line for each; `merged` is of `merge_names`."""
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
    for split, captioned in annotations.splits.items():
        texts = (text for entry in captioned for text in _texts(entry))
        first = next(texts, "")
        if len(captioned) > 1 and all(text == first for text in texts):
            caption = captioned[0].captions[0]
            lines.append(
                f"all captions of {split} are equal ({caption!r}): they tell no video from another"
            )
    return lines


def _texts(entry: Captioned) -> set[str]:
    """The captions without differences of case and white space."""
    return {" ".join(caption.lower().split()) for caption in entry.captions}
