"""MSR-VTT: the 1k-A protocol and the official splits."""

from pathlib import Path
from typing import ClassVar

from data_prep.annotation_files import read_json, read_sentences
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    find_files,
    group_captions,
    require_splits,
    with_all_captions,
)
from data_prep.csv_files import read_csv_columns
from data_prep.retrieval_builder import RetrievalBuilder

# Captions of all videos, and the official splits.
_SENTENCES = "MSRVTT_data.json"
_FILES = {
    "train_9k": (_SENTENCES, "MSRVTT_train.9k.csv"),
    "train_7k": (_SENTENCES, "MSRVTT_train.7k.csv"),
    "test": ("MSRVTT_JSFUSION_test.csv",),
}
_FULL = {"train": "full_train", "validate": "full_val", "test": "full_test"}


class Builder(RetrievalBuilder):
    """MSR-VTT: 10,000 videos with 20 captions each; 1k-A (train on 9k or 7k), official splits."""

    PUBLISHED: ClassVar = {
        "train_9k": {"videos": (9000, 9000), "captions": (180000, 180000)},
        "train_7k": {"videos": (7010, 7010), "captions": (140200, 140200)},
        "test": {"videos": (1000, 1000), "captions": (1000, 1000)},
        "full_train": {"videos": (6513, 6513)},
        "full_val": {"videos": (497, 497)},
        "full_test": {"videos": (2990, 2990), "captions": (59800, 59800)},
    }
    PROTOCOL_NAMES: ClassVar = {
        "train_9k": "9k",
        "train_7k": "7k",
        "test": "1k-A",
        **dict.fromkeys(_FULL.values(), "official"),
    }
    # The 9k and 7k contain videos of all official splits.
    PROTOCOLS: ClassVar = (
        ("train_9k", "test"),
        ("train_7k", "test"),
        ("full_train", "full_val", "full_test"),
    )

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        annotations, found = find_files(path, _FILES)
        left_out, splits = annotations.left_out, annotations.splits
        test = found.pop("test", None)
        if (sentences := path / _SENTENCES) in annotations.files:
            captions = read_sentences(sentences, left_out)
            lists = {
                split: (
                    [video for (video,) in read_csv_columns(file, ("video_id",), left_out)],
                    file,
                )
                for split, (_, file) in found.items()
            }
            official = _official_splits(sentences)
            lists |= {split: (videos, sentences) for split, videos in official.items()}
            for split, (videos, file) in lists.items():
                splits[split] = with_all_captions(videos, captions, file, sentences, left_out)
        if test:
            # 1k-A has one sentence per test video; each row is a query.
            rows = read_csv_columns(test[0], ("video_id", "sentence"), left_out)
            splits["test"] = group_captions(rows)
        return require_splits(annotations, path)


def _official_splits(path: Path) -> dict[str, list[str]]:
    """Videos of each official split, from `{"videos": [{"video_id": .., "split": ..}, ..]}`."""
    splits: dict[str, list[str]] = {}
    stated: dict[str, tuple[int, str]] = {}
    try:
        for number, video in enumerate(read_json(path, dict).get("videos", []), start=1):
            if "split" not in video:
                continue
            if not isinstance(video["video_id"], str):
                raise TypeError(f"video_id {video['video_id']!r} is not a text")
            splits.setdefault(_FULL[video["split"]], []).append(video["video_id"])
            first, split = stated.setdefault(video["video_id"], (number, video["split"]))
            if split != video["split"]:
                raise AnnotationError(
                    f'{path}: entry {first} of "videos" has {video["video_id"]!r} in the split'
                    f" {split}, and entry {number} in {video['split']}; correct one of them"
                )
    except (KeyError, TypeError) as error:
        raise AnnotationError(
            f'{path}: "videos" does not list {{"video_id": .., "split": {" | ".join(_FULL)}}}'
            f" ({type(error).__name__}: {error})"
        ) from error
    return splits
