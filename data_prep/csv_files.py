"""Strict reader of CSV files with a header. Errors name the file and the row."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.annotation_files import read_text
from data_prep.annotations import AnnotationError
from data_prep.left_out import RowError, parse_all

# Spreadsheets of many countries separate by semicolons.
_DELIMITERS = ",;\t"
# A line before the header that tells Excel the separator.
_SEPARATOR_LINE = re.compile(r"sep=([^\w\s\"'=]|\t)\s*", re.IGNORECASE)

# A row: the number of its first line in the file, and its values by column.
Row = tuple[int, dict[str, str]]


def read_csv_columns(
    path: Path, columns: tuple[str, ...], left_out: dict[str, str]
) -> list[tuple[str, ...]]:
    """Reads the named columns of a CSV file, row by row.

    Args:
      path: the file.
      columns: their names.
      left_out: receives the reason for each row with an empty value.

    Raises:
      AnnotationError: as `read_csv_rows`; a column is missing, or most rows have an empty value.
    """
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

    placed = ((f"{path.name}, row {number}", row) for number, row in rows)
    return parse_all(placed, values, left_out, f"rows of {path}")


def read_csv_rows(path: Path, errors: str = "strict") -> tuple[list[str], list[Row]]:
    """Reads a CSV file whose first line, or the one after Excel's `sep=;`, names its columns.

    Columns are separated by commas, semicolons or tabs, or as `sep=` says. Names are in
    lower case, and names and values without surrounding blanks. Empty rows are left out.

    Args:
      path: the file.
      errors: see `read_text`.

    Raises:
      AnnotationError: the file is not text in UTF-8, a quotation mark is not closed, a row has
        another number of fields than the header, or two columns have the same name.
    """
    # With newline="", the reader sees the line ends inside quotation marks.
    lines = list(io.StringIO(read_text(path, errors), newline=""))
    header, delimiter = _header(lines)
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


def _header(lines: list[str]) -> tuple[int, str]:
    """Index of the line that names the columns, and the separator."""
    if not lines:
        return 0, ","
    if found := _SEPARATOR_LINE.fullmatch(lines[0]):
        return 1, found[1]
    return 0, max(_DELIMITERS, key=lines[0].count)


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
            last = header + reader.line_num
            raise AnnotationError(_quoting_message(path, first, last, error)) from error
        if fields is None:
            return
        last = header + reader.line_num
        columns = columns or len(fields)
        separators = columns - 1
        if any(_looks_like_rows(fields[n], delimiter, n, separators) for n in range(len(fields))):
            raise AnnotationError(
                f"{path}, row {first}: a quotation mark that opens in this row closes only in line"
                f" {last}, after text that looks like other rows; close it, or remove the line ends"
                " from the text"
            )
        yield first, fields


def _looks_like_rows(field: str, delimiter: str, before: int, separators: int) -> bool:
    """Whether a field with several lines looks like rows whose quotation mark was forgotten.

    That is: one of its lines in the file has as many separators as a row.

    Args:
      field: the text.
      delimiter: the separator.
      before: number of separators before the field in its row.
      separators: number of separators of a row.
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
