"""MSVD (YouTube2Text): every caption is a query."""

from pathlib import Path
from typing import Any, ClassVar

from data_prep.annotation_files import checked_captions, read_json, read_lines, read_plain_pickle
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    find_files,
    require_splits,
    with_all_captions,
)
from data_prep.retrieval_builder import RetrievalBuilder

_LISTS = {split: (f"{split}_list.txt",) for split in ("train", "val", "test")}
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
        annotations, lists = find_files(path, _LISTS)
        left_out = annotations.left_out
        if (file := path / _PICKLE).is_file():
            captions = read_plain_pickle(file)
            if isinstance(captions, dict):
                captions = {video: _joined(sentences) for video, sentences in captions.items()}
        elif (file := path / _JSON).is_file():
            captions = read_json(file, dict)
        else:
            raise AnnotationError(f"{path} has no captions: neither {_PICKLE} nor {_JSON}")
        annotations.files.append(file)
        captions = checked_captions(file, captions, left_out)
        for split, (names,) in lists.items():
            videos = read_lines(names)
            annotations.splits[split] = with_all_captions(videos, captions, names, file, left_out)
        return require_splits(annotations, path)


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
