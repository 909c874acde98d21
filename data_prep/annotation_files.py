"""Readers for annotation file syntaxes: CSV, JSON, lists, pickles. Errors name the file."""

import csv
import json
import math
import pickle
from pathlib import Path
from typing import Any

from data_prep.annotations import AnnotationError
from drl_jax.data.video import Span


def read_csv_columns(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Reads the named columns of a CSV file with a header, row by row.

    Raises:
      AnnotationError: a column is missing, a value is empty, or the file is not CSV in UTF-8.
    """
    present, rows = read_csv_rows(path)
    for column in columns:
        if column not in present:
            raise AnnotationError(
                f"{path} has no column {column!r}; its first line is"
                f" {','.join(present) or 'empty'!r}"
            )
    values = [tuple((row[column] or "").strip() for column in columns) for row in rows]
    for number, row in enumerate(values, start=2):
        if not all(row):
            raise AnnotationError(f"{path}, row {number}: {' or '.join(columns)} is empty")
    return values


def read_csv_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Reads the column names and the rows of a CSV file with a header.

    Raises:
      AnnotationError: the file is not CSV in UTF-8.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{path} is not a CSV file in UTF-8 ({error})") from error


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Reads the non-blank lines of a text file, with their line numbers (from 1).

    Raises:
      AnnotationError: the file is not text in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path} is not a text file in UTF-8 ({error})") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def read_lines(path: Path) -> list[str]:
    """Reads the distinct lines of a list file, stripped of surrounding white space.

    Raises:
      AnnotationError: the file is not text in UTF-8, or is empty.
    """
    lines = list(dict.fromkeys(line.strip() for _, line in numbered_lines(path)))
    if not lines:
        raise AnnotationError(f"{path} is empty; expected one video per line")
    return lines


def read_json(path: Path, kind: type) -> Any:
    """Reads a JSON file.

    Args:
      path: the file.
      kind: required type of the value, dict or list.

    Raises:
      AnnotationError: the file is not JSON, or its value has another type.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AnnotationError(f"{path} is not a JSON file ({error})") from error
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list"}
        raise AnnotationError(
            f"{path} must contain {names[kind]}, but contains {type(value).__name__}; check that it"
            " belongs to this dataset"
        )
    return value


class _DataUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists, strings and numbers only; a pickle can call any other code."""

    def find_class(self, module: str, name: str) -> Any:
        raise AnnotationError(f"it refers to {module}.{name}, which plain captions do not need")

    def persistent_load(self, key: Any) -> Any:
        raise AnnotationError(f"it refers to an object outside the file ({key!r})")


def read_plain_pickle(path: Path) -> Any:
    """Reads a pickle file of plain data (dicts, lists, strings, numbers) without running its code.

    Raises:
      AnnotationError: the file is damaged, or refers to anything but plain data.
    """
    try:
        with path.open("rb") as file:
            # MSVD's file was written by Python 2: its byte strings are text.
            return _DataUnpickler(file, encoding="utf-8", errors="replace").load()
    except AnnotationError as error:
        raise AnnotationError(f"{path} is rejected: {error}") from error
    # A damaged pickle can raise any exception.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise AnnotationError(f"{path} is not a pickle file of captions ({reason})") from error


def checked_captions(path: Path, captions: Any) -> dict[str, list[str]]:
    """Validates `{video: [caption, ...]}` read from a file, and drops blank captions.

    Raises:
      AnnotationError: the value has another structure.
    """
    if not isinstance(captions, dict):
        raise AnnotationError(f"{path} must contain {{video: [caption, ..]}}")
    checked = {}
    for video, sentences in captions.items():
        if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
            raise AnnotationError(
                f"{path}, {video}: expected a list of captions, found {_shortened(sentences)}"
            )
        checked[str(video)] = [sentence.strip() for sentence in sentences if sentence.strip()]
    return checked


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_sentences(path: Path) -> dict[str, list[str]]:
    """Reads captions by video from MSR-VTT's JSON, `{"videos": [...], "sentences": [...]}`.

    Raises:
      AnnotationError: the file is not JSON, or has another structure.
    """
    document = read_json(path, dict)
    captions: dict[str, list[str]] = {}
    try:
        for sentence in document["sentences"]:
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    except (KeyError, TypeError) as error:
        raise AnnotationError(
            f"{path} does not have MSR-VTT's structure,"
            f' {{"sentences": [{{"video_id": .., "caption": ..}}, ..]}}'
            f" ({type(error).__name__}: {error})"
        ) from error
    return captions


def parse_span(start: Any, end: Any, where: str) -> Span:
    """Parses a time span in seconds.

    Args:
      start: number or text.
      end: number or text.
      where: file and row, for the error message.

    Raises:
      AnnotationError: the values are not numbers, or end is not after start.
    """
    try:
        span = (float(start), float(end))
    except (TypeError, ValueError) as error:
        raise AnnotationError(
            f"{where}: start and end must be seconds, not {start!r} and {end!r}"
        ) from error
    if not all(map(math.isfinite, span)) or not 0 <= span[0] < span[1]:
        raise AnnotationError(
            f"{where}: end must be after start, and start 0 or more; got {start} to {end} s"
        )
    return span
