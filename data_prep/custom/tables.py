"""Parquet tables of captions, with the videos inside or with their paths."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.annotations import AnnotationError, Annotations
from data_prep.custom.container_files import ContainedVideos, ContainerFiles
from data_prep.custom.listings import PlacedRow, annotations_of_files
from data_prep.custom.rows import FIELDS, captions_of, check_fields, span_of, split_of
from data_prep.parquet_files import ParquetTable
from drl_jax.runtime.files import sha256

_IDS = ("id", "key")


def read_tables(files: ContainerFiles) -> Annotations:
    """Reads the columns of Parquet files, without the bytes of videos.

    A column with the contents of videos is as `ParquetTable.video_column` says; without one, the
    column `video` names files. The id of a video inside is that in the column `id` or `key`, or the
    name of its file without suffix, a slash, and the number of the row. A video inside without
    a caption is not annotated.

    Raises:
      AnnotationError: a column is missing or of another type, a row is wrong, or there is no video
        with a caption.
      ParquetError: a file is damaged, or has row groups that are too large.
      OSError: it cannot be read.
    """
    with contextlib.closing(ParquetTable(files.paths[0])) as table:
        contained = bool(table.video_column)
    if not contained:
        annotations = annotations_of_files(files.named, _rows_of_files(files))
        annotations.hashes = {name: sha256(path) for path, name, _ in files.each()}
        return annotations
    videos, ids, count = ContainedVideos(files), set(), 0
    for path, name, split in files.each():
        stem = name[: -len(path.suffix)]
        with contextlib.closing(_opened(path, contained=True)) as table:
            for (where, row), cell in zip(_rows(table), table.cells(), strict=True):
                video_id = _id(row, where) or f"{stem}/{cell.row}"
                if video_id in ids:
                    raise AnnotationError(
                        f"{where}: another row has the id {video_id!r}, too; a video with several"
                        " captions is one row with the column captions"
                    )
                ids.add(video_id)
                if _has_no_caption(row):
                    videos.add_unannotated(cell)
                    continue
                count += 1
                captions, span = captions_of(row, where), span_of(row, where)
                videos.add(video_id, captions, split_of(row, where) or split, cell, span)
        videos.end_file(name)
    if not ids:
        raise AnnotationError(f"{files.named} has no rows")
    if not count:
        raise AnnotationError(f"{files.named} has no video with a caption")
    return videos.annotations()


def _rows_of_files(files: ContainerFiles) -> Iterator[PlacedRow]:
    for path, _, split in files.each():
        with contextlib.closing(_opened(path, contained=False)) as table:
            for where, row in _rows(table):
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
    check_fields(path, columns, needed="" if table.video_column else "video")
    if bool(table.video_column) != contained:
        raise AnnotationError(
            f"{path} {'names files' if contained else 'contains videos'}, and other files of its"
            " folder do not; build them apart"
        )
    texts = ["caption", "split", *([] if contained else ["video"])]
    for name in [name for name in texts if name in columns]:
        kind = table.type(name)
        if not (
            types.is_string(kind)
            or types.is_large_string(kind)
            or types.is_string_view(kind)
            or types.is_null(kind)
        ):
            raise AnnotationError(
                f"{path}: the column {name} has the type {kind}, but must be a string"
            )
    return table


def _rows(table: ParquetTable) -> Iterator[tuple[str, dict[str, Any]]]:
    wanted = [*FIELDS, *_IDS]
    if table.video_column:
        wanted.remove("video")
    columns = [name for name in wanted if name in table.columns]
    for number, row in enumerate(table.read(columns)):
        yield f"{table.path}, row {number} (from 0)", row


def _has_no_caption(row: dict[str, Any]) -> bool:
    return not (row.get("caption") or "").strip() and not row.get("captions")


def _id(row: dict[str, Any], where: str) -> str:
    """The field `id` or `key`: a text or a whole number; empty if the row has none."""
    value = next((row[name] for name in _IDS if row.get(name) is not None), "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise AnnotationError(f"{where}: id must be a text or a whole number, not {value!r}")
    return str(value).strip()
