"""LSMDC: short movie clips with one sentence each."""

from pathlib import Path
from typing import ClassVar

from data_prep.annotation_files import numbered_lines
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    RowError,
    find_files,
    group_captions,
    parse_rows,
    require_splits,
)
from data_prep.retrieval_builder import RetrievalBuilder

_FILES = {
    "train": ("LSMDC16_annos_training.csv",),
    "val": ("LSMDC16_annos_val.csv",),
    "test": ("LSMDC16_challenge_1000_publictect.csv",),
}
_COLUMNS = "CLIP_ID, START_ALIGNED, END_ALIGNED, START_EXTRACTED, END_EXTRACTED, SENTENCE"


class Builder(RetrievalBuilder):
    """LSMDC: about 118,000 clips cut from 202 movies, with one folder per movie."""

    # A few training clips have several sentences, so there are fewer videos than captions.
    PUBLISHED: ClassVar = {
        "train": {"captions": (101079, 101079)},
        "val": {"captions": (7408, 7408)},
        "test": {"videos": (1000, 1000), "captions": (1000, 1000)},
    }

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        annotations, found = find_files(path, _FILES)
        for split, (file,) in found.items():
            # The `.csv` is tab-separated, without header or quoting.
            lines = numbered_lines(file)
            if not lines:
                raise AnnotationError(f"{file} is empty")
            rows = parse_rows(file, "line", lines, _row, annotations.left_out)
            annotations.splits[split] = group_captions(rows)
        return require_splits(annotations, path)


def _row(line: str) -> tuple[str, str]:
    """Clip and sentence."""
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) != 6 or not fields[0] or not fields[5]:
        raise RowError(
            f"expected 6 tab-separated fields ({_COLUMNS}), found"
            f" {len(fields)}{'' if len(fields) != 6 else ' with an empty one'}"
        )
    return fields[0], fields[5]
