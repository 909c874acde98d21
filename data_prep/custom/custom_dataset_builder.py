"""A dataset of one's own, described by one CSV or JSONL file."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.annotation_files import (
    numbered_lines,
    parse_span,
    read_csv_rows,
)
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    Source,
    group_captions,
)
from data_prep.retrieval_builder import RetrievalBuilder

_FIELDS = ("video", "caption", "captions", "start", "end", "split")
# Of videos without a split, the share that becomes val, and the same again test.
_HELD_OUT = 0.1


class Builder(RetrievalBuilder):
    """Videos and captions that a file lists.

    A row has `video` (a file's path in the folder, or its name), `caption` or a list `captions`,
    and if wanted `start` and `end` in seconds and `split`. Rows of the same video and times are one
    video with several captions. Without splits, a tenth of the videos becomes val and a tenth
    test, chosen by their names.
    """

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        if not path.is_file():
            raise AnnotationError(f"no file {path}; --annotations names a .csv or .jsonl file")
        rows = list(_read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path))
        if not rows:
            raise AnnotationError(f"{path} has no rows")
        sources: dict[str, tuple[Source, ...]] = {}
        by_split: dict[str, list[tuple[str, str]]] = {}
        unassigned: list[tuple[str, str]] = []
        for where, row in rows:
            source = _source(row, where)
            video_id = _video_id(source)
            sources[video_id] = (source,)
            pairs = [(video_id, caption) for caption in _captions(row, where)]
            split = str(row.get("split") or "").strip()
            (by_split.setdefault(split, []) if split else unassigned).extend(pairs)
        if unassigned and by_split:
            raise AnnotationError(
                f"{path}: some rows have a split and others none; give it to all or to none"
            )
        if unassigned:
            by_split = _deal(unassigned, sources)
        splits = {name: group_captions(pairs) for name, pairs in by_split.items()}
        return Annotations(splits, files=[path], sources=sources)


def _read_csv(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    present, rows = read_csv_rows(path)
    _check_fields(path, present)
    for number, row in enumerate(rows, start=2):
        where = f"{path}, row {number}"
        row = {name: (value or "").strip() for name, value in row.items() if name in _FIELDS}
        if row.get("captions"):
            try:
                row["captions"] = json.loads(row["captions"])
            except json.JSONDecodeError as error:
                raise AnnotationError(
                    f'{where}: captions must be a JSON list such as ["one", "two"]; for one'
                    " caption a row, call the column caption"
                ) from error
        yield where, row


def _read_jsonl(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise AnnotationError(f"{where} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise AnnotationError(f'{where} is not an object: {{"video": .., "caption": ..}}')
        _check_fields(where, list(row))
        yield where, row


def _check_fields(where: str | Path, present: list[str]) -> None:
    missing = [] if "video" in present else ["video"]
    if not {"caption", "captions"} & set(present):
        missing.append("caption")
    if missing:
        raise AnnotationError(
            f"{where} has no {' and no '.join(missing)}; it has {', '.join(present) or 'nothing'}"
        )


def _source(row: dict[str, Any], where: str) -> Source:
    video = row.get("video")
    if not isinstance(video, str) or not video.strip():
        raise AnnotationError(f"{where}: video is empty")
    start, end = row.get("start"), row.get("end")
    if start in (None, "") and end in (None, ""):
        return Source(video.strip())
    if end in (None, ""):
        raise AnnotationError(f"{where}: start is given and end is not")
    return Source(video.strip(), parse_span(0.0 if start in (None, "") else start, end, where))


def _video_id(source: Source) -> str:
    """The file; for a part of it, the times too."""
    if source.span is None:
        return source.file
    return f"{source.file}@{source.span[0]:g}-{source.span[1]:g}"


def _captions(row: dict[str, Any], where: str) -> list[str]:
    captions = row.get("captions") or []
    if isinstance(captions, str) or not isinstance(captions, list):
        raise AnnotationError(f"{where}: captions must be a list")
    captions = [*([row["caption"]] if row.get("caption") else []), *captions]
    if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise AnnotationError(f"{where}: caption is empty")
    return [caption.strip() for caption in captions]


def _deal(
    pairs: list[tuple[str, str]], sources: dict[str, tuple[Source, ...]]
) -> dict[str, list[tuple[str, str]]]:
    """Splits by file, so that no two parts of one video are in different ones."""
    files = sorted(
        {sources[video][0].file for video, _ in pairs},
        key=lambda file: hashlib.sha256(file.encode()).digest(),
    )
    held_out = math.ceil(len(files) * _HELD_OUT) if len(files) >= 3 else 0
    split_of = {
        file: "val" if place < held_out else "test" if place < 2 * held_out else "train"
        for place, file in enumerate(files)
    }
    dealt: dict[str, list[tuple[str, str]]] = {}
    for video, caption in pairs:
        dealt.setdefault(split_of[sources[video][0].file], []).append((video, caption))
    return dealt
