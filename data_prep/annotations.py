"""What the annotation files of a dataset say, and how files of each syntax are read."""

import csv
import dataclasses
import json
import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from drl_jax.errors import UserError
from drl_jax.video import VIDEO_SUFFIXES, Span


class AnnotationError(UserError):
    """Annotation files that cannot be used; the message says which, why and what to do."""


@dataclasses.dataclass(frozen=True)
class Captioned:
    """A video of a split with its captions."""

    video_id: str
    captions: list[str]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a video lies.

    Attributes:
      file: its path in the folder of the videos, or its name, with or without suffix.
      span: the part of the file that is meant; None: all.
    """

    file: str
    span: Span | None = None


@dataclasses.dataclass
class Annotations:
    """Everything that annotation files say.

    Attributes:
      splits: captioned videos of each split; a video may stand in several.
      files: the files that were read.
      sources: for videos that are not a whole file of their name, where they may lie; the first
        that exists is meant.
      reversed_pairs: for each split, pairs of ids of a clip and the same clip played backwards.
      missing_files: files that the dataset can have and this directory has not, with what they are
        for.
    """

    splits: dict[str, list[Captioned]]
    files: list[Path] = dataclasses.field(default_factory=list)
    sources: dict[str, tuple[Source, ...]] = dataclasses.field(default_factory=dict)
    reversed_pairs: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    missing_files: dict[str, str] = dataclasses.field(default_factory=dict)

    def video_ids(self) -> list[str]:
        """Every video once, in the order of the splits."""
        return list(dict.fromkeys(v.video_id for split in self.splits.values() for v in split))

    def sources_of(self, video_id: str) -> tuple[Source, ...]:
        return self.sources.get(video_id, (Source(video_id),))


def look_for(directory: Path, files: Mapping[str, str]) -> Annotations:
    """Annotations without splits yet, that know which of `files` (name -> use) a directory has.

    Raises:
      AnnotationError: there is no such directory.
    """
    if not directory.is_dir():
        raise AnnotationError(
            f"no directory {directory}; --annotations names the folder of the annotation files"
        )
    missing = {name: use for name, use in files.items() if not (directory / name).is_file()}
    present = [directory / name for name in files if name not in missing]
    return Annotations({}, files=present, missing_files=missing)


def require_splits(annotations: Annotations, directory: Path) -> Annotations:
    """The annotations, if they have a split.

    Raises:
      AnnotationError: they have none.
    """
    if not annotations.splits:
        raise AnnotationError(
            f"no split can be read from {directory}: it lacks "
            + ", ".join(f"{name} ({use})" for name, use in annotations.missing_files.items())
        )
    return annotations


# ------------------------------------------------------------------------- syntaxes


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


def read_lines(path: Path) -> list[str]:
    """The lines of a list, without blank ones and the white space around them.

    Raises:
      AnnotationError: the file is not text, or has no line.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path} is not a text file in UTF-8 ({error})") from error
    lines = list(dict.fromkeys(filter(None, lines)))
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


# ------------------------------------------------------------------------- splits


def with_all_captions(
    video_ids: Iterable[str], captions: dict[str, list[str]], list_path: Path, captions_path: Path
) -> list[Captioned]:
    """The videos that one file lists with the captions that another has.

    Raises:
      AnnotationError: a listed video has no caption.
    """
    video_ids = list(dict.fromkeys(video_ids))
    if without := [video for video in video_ids if not captions.get(video)]:
        raise AnnotationError(
            f"{len(without)} of the {len(video_ids)} videos of {list_path} have no caption in"
            f" {captions_path} (the first: {without[0]}); the two files do not belong together"
        )
    return [Captioned(video, captions[video]) for video in video_ids]


def group_captions(rows: Iterable[tuple[str, str]]) -> list[Captioned]:
    """(video, caption) rows, one query each, with the rows of a video put together."""
    captions: dict[str, list[str]] = {}
    for video, caption in rows:
        captions.setdefault(video, []).append(caption)
    return [Captioned(video, sentences) for video, sentences in captions.items()]


def without_video_suffix(name: str) -> str:
    """A file's name without the suffix of a video; dots that belong to the name stay."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in VIDEO_SUFFIXES else name
