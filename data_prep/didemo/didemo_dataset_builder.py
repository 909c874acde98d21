"""DiDeMo as paragraph retrieval: all descriptions of a video's moments form one query."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from data_prep.annotation_files import read_entries, read_lines
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    Source,
    find_files,
    require_splits,
    with_all_captions,
    without_video_suffix,
)
from data_prep.retrieval_builder import RetrievalBuilder
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.storage import StorageSpec

_FILES = {name: (f"{name}_list.txt", f"{name}_data.json") for name in ("train", "val", "test")}
# Annotators saw the first 30 seconds of a video; published loaders read the first 31.
_SPAN = (0.0, 31.0)


class Builder(RetrievalBuilder):
    """DiDeMo: Flickr videos with descriptions of their moments."""

    DEFAULT_STORAGE = StorageSpec(FrameForm(224), 64, "jpeg")
    MAX_WORDS = 64
    # Publications differ by a few videos.
    PUBLISHED: ClassVar = {
        "train": {"videos": (8392, 8395)},
        "val": {"videos": (1065, 1065)},
        "test": {"videos": (1003, 1004)},
    }

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        annotations, pairs = find_files(path, _FILES)
        left_out = annotations.left_out
        sentences = {split: _sentences(data, left_out) for split, (_, data) in pairs.items()}
        files = {
            split: _full_names(read_lines(names), sentences[split], names, data)
            for split, (names, data) in pairs.items()
        }
        ids = _video_ids({*itertools.chain(*sentences.values()), *itertools.chain(*files.values())})
        for split, (names, data) in pairs.items():
            paragraphs = {
                file: " ".join(sentences[split].get(described, [])).strip()
                for file, described in files[split].items()
            }
            captions = {ids[file]: [text] if text else [] for file, text in paragraphs.items()}
            if len(captions) < len(paragraphs):
                doubled = next(f for f in paragraphs if f != ids[f] in paragraphs)
                raise AnnotationError(
                    f"{names} and {data} have {doubled} and {ids[doubled]}, which are one"
                    " video; describe it by one of these names"
                )
            annotations.splits[split] = with_all_captions(captions, captions, names, data, left_out)
            annotations.sources |= {ids[file]: (Source(file, _SPAN),) for file in files[split]}
        return require_splits(annotations, path)


def _sentences(path: Path, left_out: dict[str, str]) -> dict[str, list[str]]:
    """Descriptions by video, from `[{"video": .., "description": .., ..}]`."""
    form = '{"video": "..", "description": "..", ..}'
    sentences: dict[str, list[str]] = {}
    for video, text in read_entries(path, _description, left_out, form):
        sentences.setdefault(video, []).append(text)
    return sentences


def _description(entry: Mapping[str, str]) -> tuple[str, str]:
    return entry["video"].strip(), entry["description"].strip()


def _full_names(
    listed: Iterable[str], described: Iterable[str], names: Path, data: Path
) -> dict[str, str]:
    """Matches the listed videos with those that have descriptions.

    Two Flickr videos can differ in the suffix alone, so full names are compared first; but a list
    or the descriptions may have no suffixes, or others. Returns for each listed video, by its full
    name, its name in the descriptions; its own if it has none.
    """
    described = set(described)
    by_stem: dict[str, list[str]] = {}
    for video in sorted(described):
        by_stem.setdefault(without_video_suffix(video), []).append(video)
    found = {}
    for video in listed:
        if video in described:
            candidates = [video]
        elif video in by_stem:  # The list has no suffixes.
            candidates = by_stem[video]
        else:
            candidates = by_stem.get(without_video_suffix(video), [])
        if len(candidates) > 1:
            raise AnnotationError(
                f"{names}: {video} can be {' or '.join(candidates)} of {data}; list the full name"
            )
        (match,) = candidates or [video]
        found[match if video in by_stem else video] = match
    video_of: dict[str, str] = {}
    for video, match in found.items():
        if (other := video_of.setdefault(match, video)) != video:
            raise AnnotationError(
                f"{names} lists {other} and {video}, but {data} describes {match} alone; describe"
                " each by its full name, or list one of them"
            )
    return found


def _video_ids(names: Iterable[str]) -> dict[str, str]:
    """Id of each video: its name without suffix, or in full if another one has the same."""
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(without_video_suffix(name), []).append(name)
    return {
        # A name without suffix is that of the other one, from a file without suffixes.
        name: stem if len(set(group) - {stem}) <= 1 else name
        for stem, group in by_stem.items()
        for name in group
    }
