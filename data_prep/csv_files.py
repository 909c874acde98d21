"""Strict reader of CSV files with a header. Errors name the file and the row."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from data_prep.annotation_files import read_text
from data_prep.annotations import AnnotationError

# Spreadsheets of many countries separate by semicolons.
_DELIMITERS = ",;\t"

# A row: the number of its first line in the file, and its values by column.
Row = tuple[int, dict[str, str]]


def read_csv_columns(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Reads the named columns of a CSV file, row by row.

    Raises:
      AnnotationError: as `read_csv_rows`; a column is missing, or a value is empty.
    """
    present, rows = read_csv_rows(path)
    for column in columns:
        if column not in present:
            raise AnnotationError(
                f"{path} has no column {column!r}; its first line is"
                f" {','.join(present) or 'empty'!r}"
            )
    for number, row in rows:
        if empty := [column for column in columns if not row[column]]:
            raise AnnotationError(f"{path}, row {number}: {' and '.join(empty)} is empty")
    return [tuple(row[column] for column in columns) for _, row in rows]


def read_csv_rows(path: Path) -> tuple[list[str], list[Row]]:
    """Reads a CSV file whose first line names its columns.

    Columns are separated by commas, semicolons or tabs. Names are in lower case, and names and
    values without surrounding blanks. Empty rows are left out.

    Raises:
      AnnotationError: the file is not text in UTF-8, a quotation mark is not closed, a row has
        another number of fields than the header, or two columns have the same name.
    """
    text = read_text(path)
    header = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count)
    # With newline="", the reader sees the line ends inside quotation marks.
    records = _records(path, io.StringIO(text, newline=""), delimiter)
    names = [name.strip().lower() for name in next(records, (1, []))[1]]
    if doubled := sorted({name for name in names if name and names.count(name) > 1}):
        raise AnnotationError(f"{path} has two columns {doubled[0]!r}")
    rows = []
    for number, fields in records:
        fields = [field.strip() for field in fields]
        if not any(fields):
            continue
        if len(fields) != len(names):
            raise AnnotationError(
                f"{path}, row {number} has {len(fields)} fields, but the first line names"
                f" {len(names)} ({', '.join(names)}); a text that contains {delimiter!r} must be"
                " between quotation marks"
            )
        rows.append((number, dict(zip(names, fields, strict=True))))
    return names, rows


def _records(path: Path, lines: io.StringIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of its first line, and the fields, of each row."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    columns = 0
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise AnnotationError(_quoting_message(path, first, reader.line_num, error)) from error
        if fields is None:
            return
        columns = columns or len(fields)
        if any(_looks_like_rows(field, delimiter, columns) for field in fields):
            raise AnnotationError(
                f"{path}, row {first}: a quotation mark that opens in this row closes only in line"
                f" {reader.line_num}, after text that looks like other rows; close it, or remove"
                " the line ends from the text"
            )
        yield first, fields


def _looks_like_rows(field: str, delimiter: str, columns: int) -> bool:
    """Whether a field with several lines has a line that could be a row."""
    return any(line.count(delimiter) == columns - 1 for line in field.split("\n")[1:-1] if line)


def _quoting_message(path: Path, first: int, last: int, error: csv.Error) -> str:
    if last > first or "unexpected end" in str(error):
        return (
            f"{path}, row {first}: a quotation mark that opens in this row is not closed (read up"
            f" to line {last}: {error}); a quotation mark inside a quoted text must be doubled"
        )
    return (
        f"{path}, row {first} is not valid CSV ({error}); a quotation mark inside a quoted text"
        " must be doubled"
    )
