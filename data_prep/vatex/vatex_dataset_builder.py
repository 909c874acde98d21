"""VATEX: ten English captions per clip, from any of three published file layouts."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from data_prep.annotation_files import checked_captions, read_entries, read_json, read_lines
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    Source,
    find_files,
    require_splits,
    with_all_captions,
)
from data_prep.retrieval_builder import RetrievalBuilder

_LISTS = {split: (f"{split}_list.txt",) for split in ("train", "val", "test")}
# {id: [caption]}, or {id: {"enCap": [caption]}}.
_CAPTIONS = ("ref_captions.json", "vatex_data.json")
# The official files, or copies with extra fields: [{"videoID": id, "enCap": [..], ..}].
_OFFICIAL = {"train": "vatex_training_v1.0*.json", "test": "vatex_validation_v1.0*.json"}
# YouTube id, start and end of the clip in seconds.
_CLIP_ID = re.compile(r"(?P<youtube>.{11})_(?P<start>\d{6})_(?P<end>\d{6})")


class Builder(RetrievalBuilder):
    """VATEX: ten-second clips; HGR's splits, whose val and test are halves of the official val."""

    PUBLISHED: ClassVar = {
        "train": {"videos": (25991, 25991)},
        "val": {"videos": (1500, 1500)},
        "test": {"videos": (1500, 1500)},
    }

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        annotations, found = find_files(path, _LISTS)
        left_out = annotations.left_out
        lists = {split: read_lines(file) for split, (file,) in found.items()}
        captions: dict[str, list[str]] = {}
        official: dict[str, list[str]] = {}
        origin: dict[str, Path] = {}
        files = [("", path / name) for name in _CAPTIONS if (path / name).is_file()]
        for split, pattern in _OFFICIAL.items():
            files += [(split, file) for file in sorted(path.glob(pattern))]
        for split, file in files:
            read = _official_captions if split else _captions_by_id
            for video, texts in read(file, left_out).items():
                if captions.setdefault(video, texts) != texts:
                    raise AnnotationError(
                        f"{origin[video]} and {file} have different captions of {video}; keep one"
                        " of the files"
                    )
                origin.setdefault(video, file)
                if split:
                    official.setdefault(split, []).append(video)
        if not captions:
            raise AnnotationError(
                f"{path} has no captions: none of {', '.join((*_CAPTIONS, *_OFFICIAL.values()))}"
            )
        annotations.files += [file for _, file in files]
        if not lists:
            # The official files define the splits, so the list files are not missing.
            lists, annotations.missing_files = official, {}
        for split, videos in lists.items():
            annotations.splits[split] = with_all_captions(
                videos, captions, path / _LISTS[split][0], files[-1][1], left_out
            )
        annotations.sources = {video: _sources(video) for video in annotations.video_ids()}
        return require_splits(annotations, path)


def _captions_by_id(path: Path, left_out: dict[str, str]) -> dict[str, list[str]]:
    captions = {
        video: value.get("enCap") if isinstance(value, dict) else value
        for video, value in read_json(path, dict).items()
    }
    return checked_captions(path, captions, left_out)


def _official_captions(path: Path, left_out: dict[str, str]) -> dict[str, list[str]]:
    """Captions by id; the entries of one id are one video with the captions of all."""
    form = '{"videoID": "..", "enCap": ["..", ..], ..}'
    captions: dict[str, list[str]] = {}
    for video, found in read_entries(path, _entry, left_out, form):
        known = captions.setdefault(video, [])
        known += [text for text in found if text not in known] if known else found
    return checked_captions(path, captions, left_out)


def _entry(entry: Mapping[str, Any]) -> tuple[str, list[str]]:
    video, captions = entry["videoID"], entry["enCap"]
    if not isinstance(video, str) or not isinstance(captions, list):
        raise TypeError("another form")
    return video, captions


def _sources(video_id: str) -> tuple[Source, ...]:
    """The cut clip, or else the clip's span of the whole YouTube video."""
    match = _CLIP_ID.fullmatch(video_id)
    if not match:
        return (Source(video_id),)
    span = (float(match["start"]), float(match["end"]))
    return Source(video_id), Source(match["youtube"], span)
