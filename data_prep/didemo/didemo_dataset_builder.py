"""DiDeMo as paragraph retrieval: all descriptions of a video's moments are one query."""

from pathlib import Path
from typing import ClassVar

from data_prep.annotation_files import read_json, read_lines
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    Source,
    look_for_pairs,
    require_splits,
    with_all_captions,
    without_video_suffix,
)
from data_prep.retrieval_builder import RetrievalBuilder

_FILES = {name: (f"{name}_list.txt", f"{name}_data.json") for name in ("train", "val", "test")}
# Videos were cut to 30 seconds for the annotators; the field's loaders take the first 31.
_SPAN = (0.0, 31.0)


class Builder(RetrievalBuilder):
    """DiDeMo: Flickr videos, the moments of which were described."""

    DEFAULT_FORM = (224, 64, "jpeg")
    # Publications differ by a few videos.
    PUBLISHED: ClassVar = {
        "train": {"videos": (8392, 8395)},
        "val": {"videos": (1065, 1065)},
        "test": {"videos": (1003, 1004)},
    }

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        annotations, pairs = look_for_pairs(path, _FILES)
        for split, (names, data) in pairs.items():
            # A list may name a file with its suffix, and the data without, and a download may have
            # another one.
            videos = map(without_video_suffix, read_lines(names))
            annotations.splits[split] = with_all_captions(videos, _paragraphs(data), names, data)
        annotations.sources = {video: (Source(video, _SPAN),) for video in annotations.video_ids()}
        return require_splits(annotations, path)


def _paragraphs(path: Path) -> dict[str, list[str]]:
    """One caption a video, from `[{"video": .., "description": .., ..}]`."""
    sentences: dict[str, list[str]] = {}
    try:
        for entry in read_json(path, list):
            video = without_video_suffix(entry["video"])
            sentences.setdefault(video, []).append(entry["description"].strip())
    except (AttributeError, KeyError, TypeError) as error:
        raise AnnotationError(
            f'{path} does not list {{"video": .., "description": .., ..}}'
            f" ({type(error).__name__}: {error})"
        ) from error
    return {video: [" ".join(parts)] for video, parts in sentences.items()}
