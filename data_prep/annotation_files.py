"""Reads annotation files by their syntax: csv, JSON, lists, pickles. A wrong file is named."""

import csv
import json
import math
import pickle
from pathlib import Path
from typing import Any

from data_prep.annotations import AnnotationError
from drl_jax.data.video import Span


def read_csv_columns(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The named columns of a csv file with a header, row by row.

    Raises:
      AnnotationError: a column is missing, or the file is empty or not text.
    """
    present, rows = read_csv_rows(path)
    for column in columns:
        if column not in present:
            raise AnnotationError(
                f"{path} has no column {column!r}; its first line is"
                f" {','.join(present) or 'empty'!r}"
            )
    picked = [tuple((row[column] or "").strip() for column in columns) for row in rows]
    for number, row in enumerate(picked, start=2):
        if not all(row):
            raise AnnotationError(f"{path}, row {number}: {' or '.join(columns)} is empty")
    return picked


def read_csv_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The column names of a csv file with a header, and its rows.

    Raises:
      AnnotationError: the file is not text, or not csv.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{path} is not a csv file in UTF-8 ({error})") from error


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1.

    Raises:
      AnnotationError: the file is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path} is not a text file in UTF-8 ({error})") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def read_lines(path: Path) -> list[str]:
    """The different lines of a list, without the white space around them.

    Raises:
      AnnotationError: the file is not text, or has no line.
    """
    lines = list(dict.fromkeys(line.strip() for _, line in numbered_lines(path)))
    if not lines:
        raise AnnotationError(f"{path} is empty; it should have one video a line")
    return lines


def read_json(path: Path, kind: type) -> Any:
    """The value of a JSON file.

    Args:
      path: the file.
      kind: dict or list, which the value must be.

    Raises:
      AnnotationError: not JSON, or of another kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AnnotationError(f"{path} is not a JSON file ({error})") from error
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list"}
        raise AnnotationError(
            f"{path} should hold {names[kind]}, and holds {type(value).__name__};"
            " is it another dataset's file?"
        )
    return value


class _DataUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; a pickle is a program, and runs none here."""

    def find_class(self, module: str, name: str) -> Any:
        raise AnnotationError(f"it wants to run {module}.{name}, and captions need nothing of that")

    def persistent_load(self, key: Any) -> Any:
        raise AnnotationError(f"it refers to an object outside the file ({key!r})")


def read_plain_pickle(path: Path) -> Any:
    """The value of a pickle file that holds plain data only.

    Raises:
      AnnotationError: the file is damaged, or wants to load anything but plain data.
    """
    try:
        with path.open("rb") as file:
            # Python 2 wrote MSVD's: its byte strings are text.
            return _DataUnpickler(file, encoding="utf-8", errors="replace").load()
    except AnnotationError as error:
        raise AnnotationError(f"{path} is refused: {error}") from error
    # A damaged pickle fails in many ways.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise AnnotationError(f"{path} is not a pickle file of captions ({reason})") from error


def checked_captions(path: Path, captions: Any) -> dict[str, list[str]]:
    """`{video: [caption, ...]}` as a file has it, if it has that form; blank captions drop out.

    Raises:
      AnnotationError: another form.
    """
    if not isinstance(captions, dict):
        raise AnnotationError(f"{path} should hold {{video: [caption, ..]}}")
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
    """Captions by video from MSR-VTT's JSON, `{"videos": [...], "sentences": [...]}`.

    Raises:
      AnnotationError: not JSON, or not of this form.
    """
    document = read_json(path, dict)
    captions: dict[str, list[str]] = {}
    try:
        for sentence in document["sentences"]:
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    except (KeyError, TypeError) as error:
        raise AnnotationError(
            f'{path} does not have MSR-VTT\'s form, {{"sentences": [{{"video_id": .., "caption":'
            f" ..}}, ..]}} ({type(error).__name__}: {error})"
        ) from error
    return captions


def parse_span(start: Any, end: Any, where: str) -> Span:
    """Two times in seconds.

    Args:
      start: number or text.
      end: the same.
      where: file and row, for the message.

    Raises:
      AnnotationError: not numbers, or no time between them.
    """
    try:
        span = (float(start), float(end))
    except (TypeError, ValueError) as error:
        raise AnnotationError(
            f"{where}: start and end must be seconds, not {start!r} and {end!r}"
        ) from error
    if not all(map(math.isfinite, span)) or not 0 <= span[0] < span[1]:
        raise AnnotationError(f"{where}: no time lies from {start} to {end} s")
    return span
