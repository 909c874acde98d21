"""MSVD (YouTube2Text): every caption is a query."""

from pathlib import Path
from typing import Any, ClassVar

from data_prep.annotation_files import (
    checked_captions,
    read_json,
    read_lines,
    read_plain_pickle,
)
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    find_annotation_files,
    require_splits,
    with_all_captions,
)
from data_prep.retrieval_builder import RetrievalBuilder

_LISTS = {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt"}
# Captions are read from one of these: lists of words, or sentences.
_PICKLE, _JSON = "raw-captions.pkl", "captions_msvd.json"


class Builder(RetrievalBuilder):
    """MSVD: 1,970 clips with about 40 captions each."""

    PUBLISHED: ClassVar = {
        "train": {"videos": (1200, 1200)},
        "val": {"videos": (100, 100)},
        "test": {"videos": (670, 670)},
    }

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        annotations = find_annotation_files(
            path, {file: f"the split {split}" for split, file in _LISTS.items()}
        )
        captions_path = next(
            (path / name for name in (_PICKLE, _JSON) if (path / name).is_file()), None
        )
        if captions_path is None:
            raise AnnotationError(f"{path} has no captions: neither {_PICKLE} nor {_JSON}")
        annotations.files.append(captions_path)
        captions = _read_captions(captions_path, annotations.left_out)
        for split, file in _LISTS.items():
            if file not in annotations.missing_files:
                annotations.splits[split] = with_all_captions(
                    read_lines(path / file),
                    captions,
                    path / file,
                    captions_path,
                    annotations.left_out,
                )
        return require_splits(annotations, path)


def _read_captions(path: Path, left_out: dict[str, str]) -> dict[str, list[str]]:
    if path.name == _JSON:
        return checked_captions(path, read_json(path, dict), left_out)
    captions = read_plain_pickle(path)
    if isinstance(captions, dict):
        captions = {video: _joined(sentences) for video, sentences in captions.items()}
    return checked_captions(path, captions, left_out)


def _joined(sentences: Any) -> Any:
    """Joins the sentences that are lists of words; leaves anything else as it is."""
    if not isinstance(sentences, list):
        return sentences
    return [
        " ".join(sentence)
        if isinstance(sentence, list) and all(isinstance(word, str) for word in sentence)
        else sentence
        for sentence in sentences
    ]
