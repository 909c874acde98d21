"""ActivityNet Captions as paragraph retrieval: all sentences of a video form one query."""

from pathlib import Path
from typing import ClassVar

from data_prep.annotation_files import read_json
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    Source,
    find_files,
    parse_rows,
    require_splits,
    with_all_captions,
)
from data_prep.retrieval_builder import RetrievalBuilder
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.storage import StorageSpec

# Files of ids and of captions; the literature tests on val_1.
_FILES = {"train": ("train_ids.json", "train.json"), "test": ("val_ids.json", "val_1.json")}


class Builder(RetrievalBuilder):
    """ActivityNet Captions: whole videos of about two minutes, described by paragraphs."""

    DEFAULT_STORAGE = StorageSpec(FrameForm(224), 64, "jpeg")
    MAX_WORDS = 64
    PUBLISHED: ClassVar = {"train": {"videos": (10009, 10009)}, "test": {"videos": (4917, 4917)}}

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        annotations, found = find_files(path, _FILES)
        left_out = annotations.left_out
        for split, (ids, captions) in found.items():
            videos = [str(video).removeprefix("v_") for video in read_json(ids, list)]
            paragraphs = _paragraphs(captions, left_out)
            annotations.splits[split] = with_all_captions(
                videos, paragraphs, ids, captions, left_out
            )
        annotations.sources = {
            video: (Source(video), Source(f"v_{video}")) for video in annotations.video_ids()
        }
        return require_splits(annotations, path)


def _paragraphs(path: Path, left_out: dict[str, str]) -> dict[str, list[str]]:
    """One caption per video, from `{"v_ID": {"sentences": [..], ..}}`."""
    entries = read_json(path, dict)
    if doubled := [video for video in entries if f"v_{video}" in entries]:
        raise AnnotationError(
            f"{path} has the keys {doubled[0]!r} and 'v_{doubled[0]}' of one video"
        )
    rows = ((video, (video, entry)) for video, entry in entries.items())
    form = '{"sentences": ["..", ..], ..}'
    return dict(parse_rows(path, "video", rows, _paragraph, left_out, form))


def _paragraph(item: tuple[str, dict]) -> tuple[str, list[str]]:
    video, entry = item
    if not isinstance(entry["sentences"], list):
        raise TypeError("not a list")
    text = " ".join(sentence.strip() for sentence in entry["sentences"]).strip()
    return video.removeprefix("v_"), [text] if text else []
