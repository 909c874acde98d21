"""Readers of the syntaxes of annotation files: text, JSON, lists, pickles. Errors name the file."""

import codecs
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.annotations import AnnotationError, Parsed, RowError, parse_rows
from drl_jax.data.video import Span
from drl_jax.runtime.files import check_memo, parse_json


def read_text(path: Path, errors: str = "strict") -> str:
    """Reads a text file in UTF-8, with or without a byte order mark, with its line ends.

    `errors` is "strict", or "surrogateescape" for `text_problem`.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:1000]:
        raise AnnotationError(f"{path} is in UTF-16 or is no text; save it as text in UTF-8")
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise AnnotationError(
            f"{path}, line {line} is not text in UTF-8 (byte 0x{content[error.start]:02x});"
            " save the file as UTF-8"
        ) from error


def numbered_lines(path: Path, errors: str = "strict") -> list[tuple[int, str]]:
    """The non-blank lines of a text file, with their numbers (from 1); as `read_text`."""
    # str.splitlines would also split at characters that JSON allows in a text, such as U+2028.
    lines = read_text(path, errors).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def read_lines(path: Path) -> list[str]:
    """The distinct lines, stripped, of a list file that is not empty; raises as `read_text`."""
    lines = list(dict.fromkeys(line.strip() for _, line in numbered_lines(path)))
    if not lines:
        raise AnnotationError(f"{path} is empty; expected one video per line")
    return lines


def read_json(path: Path, kind: type) -> Any:
    """Reads a JSON file that contains a dict or a list."""
    try:
        value = parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path} is not a JSON file ({error})") from error
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list"}
        raise AnnotationError(
            f"{path} must contain {names[kind]}, but contains {type(value).__name__}; check that it"
            " belongs to this dataset"
        )
    return value


def read_entries(
    path: Path, parse: Callable[[Any], Parsed], left_out: dict[str, str], form: str
) -> list[Parsed]:
    """Parses the entries of a JSON list; see `parse_rows`."""
    entries = enumerate(read_json(path, list), start=1)
    return parse_rows(path, "entry", entries, parse, left_out, form)


class _DataUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists, strings and numbers only; a pickle can call any other code."""

    def find_class(self, module: str, name: str) -> Any:
        raise AnnotationError(f"it refers to {module}.{name}, which plain captions do not need")

    def persistent_load(self, key: Any) -> Any:
        raise AnnotationError(f"it refers to an object outside the file ({key!r})")


def read_plain_pickle(path: Path) -> Any:
    """Reads a pickle file of dicts, lists, strings and numbers, without running its code."""
    try:
        with path.open("rb") as file:
            check_memo(file)
            # MSVD's file was written by Python 2: its byte strings are text.
            return _DataUnpickler(file, encoding="utf-8", errors="replace").load()
    except AnnotationError as error:
        raise AnnotationError(f"{path} is rejected: {error}") from error
    # A damaged pickle can raise any exception.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise AnnotationError(f"{path} is not a pickle file of captions ({reason})") from error


def checked_captions(path: Path, captions: Any, left_out: dict[str, str]) -> dict[str, list[str]]:
    """Validates `{video: [caption, ...]}` read from a file, and drops blank captions."""
    if not isinstance(captions, dict):
        raise AnnotationError(f"{path} must contain {{video: [caption, ..]}}")
    for video in captions:
        if not isinstance(video, str) and str(video) in captions:
            raise AnnotationError(f"{path} has the key {video!r} and the key {str(video)!r}")

    def parse(item: tuple[Any, Any]) -> tuple[str, list[str]]:
        video, texts = item
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RowError(f"expected a list of captions, found {_shortened(texts)}")
        return str(video), [text.strip() for text in texts if text.strip()]

    rows = ((video, (video, texts)) for video, texts in captions.items())
    return dict(parse_rows(path, "video", rows, parse, left_out))


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_sentences(path: Path, left_out: dict[str, str]) -> dict[str, list[str]]:
    """Reads captions by video from MSR-VTT's JSON, `{"videos": [...], "sentences": [...]}`.

    Blank captions are left out, and sentences of another form with a reason.
    """
    sentences = read_json(path, dict).get("sentences")
    form = '{"video_id": "..", "caption": ".."}'
    if not isinstance(sentences, list):
        raise AnnotationError(
            f'{path} does not have MSR-VTT\'s structure, {{"sentences": [{form}]}}'
        )
    rows = enumerate(sentences, start=1)
    captions: dict[str, list[str]] = {}
    for video, caption in parse_rows(path, "sentence", rows, _sentence, left_out, form):
        if caption.strip():
            captions.setdefault(video, []).append(caption)
    return captions


def _sentence(entry: Any) -> tuple[str, str]:
    video, caption = entry["video_id"], entry["caption"]
    if not isinstance(video, str) or not isinstance(caption, str):
        raise RowError(
            f"video_id and caption must be texts, not {_shortened(video)} and {_shortened(caption)}"
        )
    return video, caption


def parse_span(start: Any, end: Any) -> Span:
    """A span of two times: seconds, or texts such as "1:02:03.5"; RowError for others."""
    try:
        span = (_seconds(start), _seconds(end))
    # OverflowError: JSON can have whole numbers of any size.
    except (TypeError, ValueError, OverflowError) as error:
        raise RowError(
            "start and end must be seconds or h:mm:ss, with a decimal point, not"
            f" {_shortened(start)} and {_shortened(end)}"
        ) from error
    if not all(map(math.isfinite, span)) or not 0 <= span[0] < span[1]:
        raise RowError(f"end must be after start, and start 0 or more; got {start} to {end}")
    return span


def _seconds(time: Any) -> float:
    """Seconds of a number, or of a text with seconds, minutes:seconds or hours:minutes:seconds."""
    if not isinstance(time, str):
        if isinstance(time, bool):
            raise TypeError("not a number")
        return float(time)
    *leading, seconds = time.split(":")
    if not leading:
        return float(seconds)
    if len(leading) > 2 or not all(part.isdecimal() for part in leading):
        raise ValueError("not a time")
    if any(float(part) >= 60 for part in (*leading[1:], seconds)):
        raise ValueError("more than 59 minutes or seconds")
    return sum(60**power * float(part) for power, part in enumerate([seconds, *leading[::-1]]))
