"""Lists of video files with captions: csv and jsonl."""

import collections
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.annotation_files import numbered_lines
from data_prep.annotations import AnnotationError, Annotations, RowError, Source, check_lost
from data_prep.csv_files import read_csv_rows
from data_prep.custom.rows import (
    FIELDS,
    annotations_of,
    captions_of,
    missing_fields,
    read_object,
    span_of,
    split_of,
    video_of,
)
from drl_jax.runtime.files import parse_json

# Where a row is, and its fields, or why it has none.
PlacedRow = tuple[str, dict[str, Any] | RowError]


def read_listing(path: Path) -> Annotations:
    """Reads a csv file or a jsonl file."""
    if path.suffix.lower() == ".json":
        raise AnnotationError(
            f"{path} cannot be read: --annotations must be a .csv or .jsonl file (one JSON object"
            " per line)"
        )
    read = _read_jsonl if path.suffix.lower() == ".jsonl" else _read_csv
    annotations = annotations_of_files(path, read(path))
    annotations.files = [path]
    return annotations


def annotations_of_files(where: Path, rows: Iterable[PlacedRow]) -> Annotations:
    """Annotations from the rows of `where`, which name video files.

    Rows with the same video and span are one video. A row that is wrong is left out.
    """
    splits: dict[str, dict[Source, list[str]]] = {}
    left_out: dict[str, str] = {}
    kept = 0
    for place, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            source, captions = Source(video_of(row), span_of(row)), captions_of(row)
        except RowError as error:
            left_out[place] = str(error)
        else:
            known = splits.setdefault(split_of(row, place), {}).setdefault(source, captions)
            if known is not captions:
                known += captions
            kept += 1
    check_lost(left_out, kept, f"rows of {where}")
    if not splits:
        raise AnnotationError(f"{where} has no rows")
    ids = _video_ids(dict.fromkeys(source for videos in splits.values() for source in videos))
    named = {
        name: {ids[source]: captions for source, captions in videos.items()}
        for name, videos in splits.items()
    }
    # A whole file with its name as id needs no source.
    sources = {video: (source,) for source, video in ids.items() if source.span is not None}
    return annotations_of(where, named, sources=sources, left_out=left_out)


def _read_csv(path: Path) -> Iterator[PlacedRow]:
    present, rows = read_csv_rows(path, errors="surrogateescape")
    if problem := missing_fields(present):
        raise AnnotationError(f"{path} {problem}")
    for number, fields in rows:
        row: dict[str, Any] | RowError = {
            name: value for name, value in fields.items() if name in FIELDS
        }
        if fields.get("captions"):
            try:
                row["captions"] = parse_json(fields["captions"])
            except (ValueError, RecursionError):
                row = RowError(
                    'captions must be a JSON list such as ["one", "two"]; with one caption per row,'
                    " name the column caption"
                )
        yield f"{path.name}, row {number}", row


def _read_jsonl(path: Path) -> Iterator[PlacedRow]:
    for number, line in numbered_lines(path, errors="surrogateescape"):
        try:
            row: dict[str, Any] | RowError = read_object(line)
            if problem := missing_fields(list(row)):
                row = RowError(problem)
        except RowError as error:
            row = error
        yield f"{path.name}, line {number}", row


def _video_ids(sources: Iterable[Source]) -> dict[Source, str]:
    """A distinct id of each source: seconds have six digits, or all where two spans share these."""
    short = {source: _video_id(source) for source in sources}
    counts = collections.Counter(short.values())
    return {
        source: video_id if counts[video_id] == 1 else _video_id(source, exact=True)
        for source, video_id in short.items()
    }


def _video_id(source: Source, *, exact: bool = False) -> str:
    if source.span is None:
        return source.file
    start, end = (repr(time) if exact else f"{time:g}" for time in source.span)
    return f"{source.file}@{start}-{end}"
