"""Strict reader of CSV files with a header. Errors name the file and the row."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.annotation_files import read_text
from data_prep.annotations import AnnotationError, RowError, parse_rows

# Spreadsheets of many countries separate by semicolons.
_DELIMITERS = ",;\t"
# A line before the header that tells Excel the separator.
_SEPARATOR_LINE = re.compile(r"sep=([^\w\s\"'=]|\t)\s*", re.IGNORECASE)


def read_csv_columns(
    path: Path, columns: tuple[str, ...], left_out: dict[str, str]
) -> list[tuple[str, ...]]:
    """Reads the named columns of a CSV file, row by row; leaves out rows with an empty value."""
    present, rows = read_csv_rows(path)
    for column in columns:
        if column not in present:
            raise AnnotationError(
                f"{path} has no column {column!r}; its header is {','.join(present) or 'empty'!r}"
            )

    def values(row: dict[str, str]) -> tuple[str, ...]:
        if empty := [column for column in columns if not row[column]]:
            raise RowError(f"{' and '.join(empty)} is empty")
        return tuple(row[column] for column in columns)

    return parse_rows(path, "row", rows, values, left_out)


def read_csv_rows(
    path: Path, errors: str = "strict"
) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Reads a CSV file whose first line, or the one after Excel's `sep=;`, names its columns.

    Returns the names, in lower case, and for each non-empty row the number of its first line
    and the values by column, without surrounding blanks. Columns are separated by commas,
    semicolons or tabs, or as `sep=` says; `errors` as in `read_text`.
    """
    # With newline="", the reader sees the line ends inside quotation marks.
    lines = list(io.StringIO(read_text(path, errors), newline=""))
    header, delimiter = 0, ","
    if lines and (found := _SEPARATOR_LINE.fullmatch(lines[0])):
        header, delimiter = 1, found[1]
    elif lines:
        delimiter = max(_DELIMITERS, key=lines[0].count)
    records = _records(path, lines, header, delimiter)
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
                f"{path}, row {number} has {len(fields)} fields, but the header names"
                f" {len(names)} ({', '.join(names)}); a text that contains {delimiter!r} must be"
                " between quotation marks"
            )
        rows.append((number, dict(zip(names, fields, strict=True))))
    return names, rows


def _records(
    path: Path, lines: list[str], header: int, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of its first line, and the fields, of each row from the header on."""
    reader = csv.reader(lines[header:], delimiter=delimiter, strict=True, skipinitialspace=True)
    columns = 0
    while True:
        first = header + reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            last, doubled = header + reader.line_num, "a quotation mark inside a quoted text must"
            if last > first or "unexpected end" in str(error):
                problem = (
                    f": a quotation mark that opens in this row is not closed (read up to line"
                    f" {last}: {error})"
                )
            else:
                problem = f" is not valid CSV ({error})"
            raise AnnotationError(f"{path}, row {first}{problem}; {doubled} be doubled") from error
        if fields is None:
            return
        columns = columns or len(fields)
        if any(_looks_like_rows(fields[n], delimiter, n, columns - 1) for n in range(len(fields))):
            raise AnnotationError(
                f"{path}, row {first}: a quotation mark that opens in this row closes only in line"
                f" {header + reader.line_num}, after text that looks like other rows; close it, or"
                " remove the line ends from the text"
            )
        yield first, fields


def _looks_like_rows(field: str, delimiter: str, before: int, separators: int) -> bool:
    """Whether a field with several lines looks like rows whose quotation mark was forgotten.

    That is: one of its lines has as many separators as a row, which has `before` before the field.
    """
    counts = [line.count(delimiter) for line in re.split("\r\n|\r|\n", field)]
    if len(counts) == 1:
        return False
    # Where the text itself needs no separator to make the line a row, the count says nothing: the
    # first line of a text in the last column, and the last line of a text in the first column.
    after = separators - before
    return (
        counts[0] == after > 0
        or counts[-1] == before > 0
        or any(count == separators > 0 for count in counts[1:-1])
    )
