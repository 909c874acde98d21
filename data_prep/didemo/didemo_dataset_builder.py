"""DiDeMo as paragraph retrieval: all descriptions of a video's moments form one query."""

from pathlib import Path
from typing import ClassVar

from data_prep.annotation_files import read_json, read_lines
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    Source,
    find_annotation_pairs,
    require_splits,
    with_all_captions,
    without_video_suffix,
)
from data_prep.retrieval_builder import RetrievalBuilder
from drl_jax.data.storage import StorageSpec

_FILES = {name: (f"{name}_list.txt", f"{name}_data.json") for name in ("train", "val", "test")}
# Annotators saw the first 30 seconds of a video; published loaders read the first 31.
_SPAN = (0.0, 31.0)


class Builder(RetrievalBuilder):
    """DiDeMo: Flickr videos with descriptions of their moments."""

    DEFAULT_STORAGE = StorageSpec(224, 64, "jpeg")
    MAX_WORDS = 64
    # Publications differ by a few videos.
    PUBLISHED: ClassVar = {
        "train": {"videos": (8392, 8395)},
        "val": {"videos": (1065, 1065)},
        "test": {"videos": (1003, 1004)},
    }

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        annotations, pairs = find_annotation_pairs(path, _FILES)
        for split, (names, data) in pairs.items():
            # The list may have suffixes where the captions have none, and a downloaded file may
            # have a different one.
            videos = map(without_video_suffix, read_lines(names))
            annotations.splits[split] = with_all_captions(videos, _paragraphs(data), names, data)
        annotations.sources = {video: (Source(video, _SPAN),) for video in annotations.video_ids()}
        return require_splits(annotations, path)


def _paragraphs(path: Path) -> dict[str, list[str]]:
    """One caption per video, from `[{"video": .., "description": .., ..}]`."""
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
