"""Lists of video files with captions: csv and jsonl."""

import collections
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.annotation_files import numbered_lines
from data_prep.annotations import AnnotationError, Annotations, Captioned, Source
from data_prep.csv_files import read_csv_rows
from data_prep.custom.rows import (
    FIELDS,
    SplitRows,
    captions_of,
    check_fields,
    span_of,
    split_of,
    video_of,
)

# Where a row is, for error messages, and its fields.
PlacedRow = tuple[str, dict[str, Any]]


def read_listing(path: Path) -> Annotations:
    """Reads a csv file or a jsonl file.

    Raises:
      AnnotationError: it is neither, or a row is wrong.
    """
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
    """Annotations from rows that name video files.

    Rows with the same video and span are one video with several captions.

    Args:
      where: what has the rows, for error messages.
      rows: the rows.

    Raises:
      AnnotationError: a row is wrong, or there is none.
    """
    collected: SplitRows[Source] = SplitRows(where)
    for place, row in rows:
        source = Source(video_of(row, place), span_of(row, place))
        collected.add(source, captions_of(row, place), split_of(row, place))
    splits = collected.splits(lambda source: source.file)
    if not splits:
        raise AnnotationError(f"{where} has no rows")
    ids = _video_ids(dict.fromkeys(source for videos in splits.values() for source in videos))
    return Annotations(
        {
            name: [Captioned(ids[source], captions) for source, captions in videos.items()]
            for name, videos in splits.items()
        },
        # A whole file with its name as id needs no source.
        sources={video: (source,) for source, video in ids.items() if source.span is not None},
    )


def _read_csv(path: Path) -> Iterator[PlacedRow]:
    present, rows = read_csv_rows(path)
    check_fields(path, present)
    for number, row in rows:
        where = f"{path}, row {number}"
        row = {name: value for name, value in row.items() if name in FIELDS}
        if row.get("captions"):
            try:
                row["captions"] = json.loads(row["captions"])
            except (ValueError, RecursionError) as error:
                raise AnnotationError(
                    f'{where}: captions must be a JSON list such as ["one", "two"]; with'
                    " one caption per row, name the column caption"
                ) from error
        yield where, row


def _read_jsonl(path: Path) -> Iterator[PlacedRow]:
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AnnotationError(f"{where} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise AnnotationError(f'{where} is not an object: {{"video": .., "caption": ..}}')
        row = {name.strip().lower(): value for name, value in row.items()}
        check_fields(where, list(row))
        yield where, row


def _video_ids(sources: Iterable[Source]) -> dict[Source, str]:
    """A distinct id of each source: its file, followed by the span if it has one.

    Seconds have six digits, and all digits where six are the same for two spans.
    """
    short = {source: _short_id(source) for source in sources}
    counts = collections.Counter(short.values())
    return {
        source: video_id if counts[video_id] == 1 else _exact_id(source)
        for source, video_id in short.items()
    }


def _short_id(source: Source) -> str:
    if source.span is None:
        return source.file
    return f"{source.file}@{source.span[0]:g}-{source.span[1]:g}"


def _exact_id(source: Source) -> str:
    if source.span is None:
        return source.file
    return f"{source.file}@{source.span[0]!r}-{source.span[1]!r}"
