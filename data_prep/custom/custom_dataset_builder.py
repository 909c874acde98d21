"""Your own dataset, described by one CSV or JSONL file."""

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
# Without splits, the fraction of files that becomes val, and the fraction that becomes test.
_HELD_OUT = 0.1


class Builder(RetrievalBuilder):
    """Videos and captions listed in a file.

    A row has `video` (path below the videos' folder, or file name), `caption` or a list `captions`,
    and optionally `start` and `end` in seconds and `split`. Rows with the same video and span are
    one video with several captions. Without splits, a tenth of the files becomes val and a tenth
    test, chosen by the hash of their names.
    """

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        if not path.is_file():
            raise AnnotationError(f"no file {path}; --annotations must be a .csv or .jsonl file")
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
                f"{path}: some rows have a split and others have none; set it in all rows or none"
            )
        if unassigned:
            by_split = _assign_splits(unassigned, sources)
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
                    f'{where}: captions must be a JSON list such as ["one", "two"]; with'
                    " one caption per row, name the column caption"
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
        raise AnnotationError(f"{where}: start is set but end is not")
    return Source(video.strip(), parse_span(0.0 if start in (None, "") else start, end, where))


def _video_id(source: Source) -> str:
    """Id of a video: its file, followed by the span if it has one."""
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


def _assign_splits(
    pairs: list[tuple[str, str]], sources: dict[str, tuple[Source, ...]]
) -> dict[str, list[tuple[str, str]]]:
    """Assigns splits by file, so that all clips cut from a file are in the same split."""
    files = sorted(
        {sources[video][0].file for video, _ in pairs},
        key=lambda file: hashlib.sha256(file.encode()).digest(),
    )
    held_out = math.ceil(len(files) * _HELD_OUT) if len(files) >= 3 else 0
    split_of = {
        file: "val" if rank < held_out else "test" if rank < 2 * held_out else "train"
        for rank, file in enumerate(files)
    }
    by_split: dict[str, list[tuple[str, str]]] = {}
    for video, caption in pairs:
        by_split.setdefault(split_of[sources[video][0].file], []).append((video, caption))
    return by_split
