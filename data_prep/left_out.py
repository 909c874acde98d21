"""What cannot be used of annotation files: it is left out with a reason, unless it is too much."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from data_prep.annotations import MAX_LOST, AnnotationError, Annotations
from drl_jax.runtime.errors import printable

Item = TypeVar("Item")
Parsed = TypeVar("Parsed")


class RowError(AnnotationError):
    """A row, or a member of a tar file, that is left out. The message does not name it."""


def check_lost(
    lost: Mapping[str, str], kept: int, what: str, remedy: str = "correct or remove them"
) -> None:
    """Checks that enough can be used.

    Args:
      lost: reasons, by name, for what cannot be used.
      kept: number of what can be used.
      what: of both, for the error message, e.g. "rows of mine.csv".
      remedy: what to do, for the error message.

    Raises:
      AnnotationError: some is lost, and nothing is left or more than `MAX_LOST` is lost.
    """
    total = len(lost) + kept
    if not lost or (kept and len(lost) <= MAX_LOST * total):
        return
    first = "; ".join(f"{name}: {reason}" for name, reason in itertools.islice(lost.items(), 3))
    if not kept:
        raise AnnotationError(f"none of the {total} {what} can be used; the first: {first}")
    raise AnnotationError(
        f"{len(lost)} of the {total} {what} cannot be used, and a build may lose at most"
        f" {MAX_LOST:.0%}: {remedy}; the first: {first}"
    )


def parse_all(
    items: Iterable[tuple[str, Item]],
    parse: Callable[[Item], Parsed],
    left_out: dict[str, str],
    what: str,
    form: str = "",
) -> list[Parsed]:
    """Parses the rows of a file, and leaves out those that cannot be used.

    Args:
      items: place and value of each row.
      parse: raises RowError, AttributeError, KeyError or TypeError for a value of another form.
      left_out: receives the reasons by place.
      what: the rows, for the error message, e.g. "rows of mine.csv".
      form: the form, for the reasons.

    Raises:
      AnnotationError: see `check_lost`.
    """
    parsed, lost = [], {}
    for place, item in items:
        try:
            parsed.append(parse(item))
        except RowError as error:
            lost[place] = str(error)
        except (AttributeError, KeyError, TypeError):
            lost[place] = f"is not {form}"
    check_lost(lost, len(parsed), what)
    left_out |= lost
    return parsed


def text_problem(text: str) -> str:
    """Why a text cannot be stored and printed; empty if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        if 0xDC80 <= half <= 0xDCFF:  # How Python reads a byte that is no text (PEP 383).
            return f"is not text in UTF-8 (byte 0x{half - 0xDC00:02x}); save the file as UTF-8"
        # JSON can contain it: "\\ud83d".
        return f"has half of a character in {text!a}"
    return ""


def name_problem(name: str) -> str:
    """Why a text cannot be the name of a video; empty if it can."""
    if any(character in name for character in "\n\r\t"):
        return "has a line end or a tab in its name"
    return text_problem(name)


def leave_out_texts(annotations: Annotations) -> set[str]:
    """Leaves out the videos whose ids or captions cannot be stored, and returns their ids.

    Raises:
      AnnotationError: see `check_lost`, for each split.
    """
    left_out: set[str] = set()
    for split, captioned in annotations.splits.items():
        lost = {}
        for entry in captioned:
            problems = (name_problem(entry.video_id), *map(text_problem, entry.captions))
            if problem := next(filter(None, problems), ""):
                lost[entry.video_id] = problem
        if lost:
            named = {printable(video): reason for video, reason in lost.items()}
            check_lost(named, len(captioned) - len(lost), f"videos of {split}")
            annotations.left_out |= named
            kept = [entry for entry in captioned if entry.video_id not in lost]
            annotations.splits[split] = kept
            left_out |= lost.keys()
    return left_out
