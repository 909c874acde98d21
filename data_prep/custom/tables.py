"""Parquet tables of captions, with the videos inside or with their paths."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.annotations import AnnotationError, Annotations, RowError, name_problem
from data_prep.custom.container_files import ContainerFiles, Sample, contained_annotations
from data_prep.custom.listings import PlacedRow, annotations_of_files
from data_prep.custom.rows import FIELDS, missing_fields
from data_prep.parquet_files import ParquetTable
from drl_jax.runtime.files import sha256

_IDS = ("id", "key")


def read_tables(files: ContainerFiles) -> Annotations:
    """Reads the columns of Parquet files, without the bytes of videos.

    Without a `ParquetTable.video_column`, the column `video` names files. The id of a video inside
    is its `id` or `key`, or the name of its file without suffix, a slash, and the row.
    """
    with contextlib.closing(ParquetTable(files.paths[0])) as table:
        contained = bool(table.video_column)
    if not contained:
        annotations = annotations_of_files(files.named, _rows_of_files(files))
        annotations.hashes = {name: sha256(path) for path, name, _ in files.each()}
        return annotations
    ids: set[str] = set()  # Of the rows that are not left out.

    def read(path: Path, name: str) -> Iterator[Sample]:
        with contextlib.closing(_opened(path, contained=True)) as table:
            for (where, row), cell in zip(_rows(table, name), table.cells(), strict=True):
                try:
                    video_id = _id(row) or f"{name[: -len(path.suffix)]}/{cell.row}"
                except RowError as error:
                    yield Sample("", where, where, error, cell)
                    continue
                if video_id in ids:
                    raise AnnotationError(
                        f"{files.named}: {where} has the id {video_id!r} of an earlier row; a video"
                        " with several captions is one row with the column captions"
                    )
                ids.add(video_id)
                yield Sample(video_id, where, where, row, cell)

    return contained_annotations(files, read)


def _rows_of_files(files: ContainerFiles) -> Iterator[PlacedRow]:
    for path, name, split in files.each():
        with contextlib.closing(_opened(path, contained=False)) as table:
            for where, row in _rows(table, name):
                yield where, row if row.get("split") else {**row, "split": split}


def _opened(path: Path, *, contained: bool) -> ParquetTable:
    """Opens a table and checks its columns."""
    from pyarrow import types

    table = ParquetTable(path)
    columns = list(table.columns)
    if "bytes" in columns and not table.video_column:
        raise AnnotationError(
            f"{path}: the column bytes has the type {table.type('bytes')}, but must be binary, the"
            " contents of the video files; a column of paths below --videos is called video"
        )
    if problem := missing_fields(columns, needed="" if table.video_column else "video"):
        raise AnnotationError(f"{path} {problem}")
    if bool(table.video_column) != contained:
        raise AnnotationError(
            f"{path} {'names files' if contained else 'contains videos'}, and other files of its"
            " folder do not; build them apart"
        )
    kinds = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    for name in ["caption", "split", *([] if contained else ["video"])]:
        kind = table.type(name) if name in columns else None
        if kind is not None and types.is_struct(kind) and kind.get_field_index("path") >= 0:
            kind = kind.field("path").type
        if kind is not None and not any(is_kind(kind) for is_kind in kinds):
            raise AnnotationError(
                f"{path}: the column {name} has the type {kind}, but must be a string"
            )
    return table


def _rows(table: ParquetTable, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    wanted = [*FIELDS, *_IDS]
    if table.video_column:
        wanted.remove("video")
    columns = [name for name in wanted if name in table.columns]
    for number, row in enumerate(table.read(columns)):
        if isinstance(video := row.get("video"), dict):
            row["video"] = video.get("path")
        yield f"{name}, row {number} (from 0)", row


def _id(row: dict[str, Any]) -> str:
    """The field `id` or `key`: a text or a whole number; empty if the row has none."""
    value = next((row[name] for name in _IDS if row.get(name) is not None), "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"id must be a text or a whole number, not {value!r}")
    if problem := name_problem(str(value).strip()):
        raise RowError(f"id {problem}")
    return str(value).strip()
