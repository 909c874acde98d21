"""What is embedded: a file of captions, or a folder of videos."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

from drl_jax.data.video import VIDEO_SUFFIXES
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.files import parse_json
from drl_jax.search.reading import FoundFile, find_videos

# Name of the column of a table, and of the field of an object.
_FIELD = "caption"


@dataclasses.dataclass(frozen=True)
class VideoFolder:
    """The videos below a folder.

    Attributes:
      folder: the folder.
      found: its files, with the seconds that decoding may take.
      unusable: why other names are no videos, by path.
    """

    folder: Path
    found: list[FoundFile]
    unusable: dict[str, str]


def find_folder(folder: Path, timeout: float) -> VideoFolder:
    """Lists the videos below a folder.

    Args:
      folder: searched recursively.
      timeout: seconds for decoding one video, and one more for each MB of its file.

    Raises:
      UserError: the folder does not exist, or has no video.
    """
    if not folder.is_dir():
        raise UserError(f"no directory {folder}; --videos names the folder of the videos")
    unusable: dict[str, str] = {}
    found = list(find_videos(folder, timeout, unusable))
    if not found:
        raise UserError(f"no video in {folder} (looked for {' '.join(VIDEO_SUFFIXES)})")
    return VideoFolder(folder, found, unusable)


def read_captions(path: Path) -> list[str]:
    """Reads the captions of a file by its suffix.

    `.txt` has one in each line, `.csv` a column `caption`, `.jsonl` a string or an object with the
    field `caption` in each line, and `.json` a list of these.

    Raises:
      UserError: it cannot be read, has no captions, or a caption is blank.
    """
    if path.suffix not in _READERS:
        raise UserError(f"{path}: a file of captions is {', '.join(_READERS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Unavailable(path, error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error
    captions = []
    try:
        for place, caption in _READERS[path.suffix](path, text):
            captions.append(_checked(caption, f"{path}, {place}"))
    except (csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a {path.suffix[1:]} file ({error})") from error
    if not captions:
        raise UserError(f"{path} has no captions")
    return captions


def _checked(value: object, where: str) -> str:
    caption = value.get(_FIELD) if isinstance(value, dict) else value
    if not isinstance(caption, str):
        raise UserError(f"{where}: there is no {_FIELD}")
    if not caption.strip():
        raise UserError(f"{where}: the caption is blank")
    # JSON can hold half of a surrogate pair.
    if "\0" in caption or any("\ud800" <= character <= "\udfff" for character in caption):
        raise UserError(f"{where}: the caption has a character that is no text")
    return caption


# Yields captions, or objects with one, each with its place.
_Captions = Iterator[tuple[str, object]]


def _txt(path: Path, text: str) -> _Captions:
    del path
    for number, line in enumerate(io.StringIO(text), start=1):
        yield f"line {number}", line.strip()


def _csv(path: Path, text: str) -> _Captions:
    rows = csv.reader(io.StringIO(text), strict=True)
    header = next(rows, [_FIELD])
    if _FIELD not in header:
        raise UserError(f"{path} has no column {_FIELD}; it has {', '.join(header)}")
    if header.count(_FIELD) > 1:
        raise UserError(f"{path} has two columns {_FIELD}")
    column = header.index(_FIELD)
    for row in rows:
        yield f"line {rows.line_num}", "".join(row[column : column + 1])


def _jsonl(path: Path, text: str) -> _Captions:
    del path
    for number, line in enumerate(io.StringIO(text), start=1):
        yield f"line {number}", parse_json(line) if line.strip() else ""


def _json(path: Path, text: str) -> _Captions:
    values = parse_json(text)
    if not isinstance(values, list):
        raise UserError(f"{path} is not a list of captions")
    for number, value in enumerate(values, start=1):
        yield f"item {number}", value


_READERS = {".txt": _txt, ".csv": _csv, ".jsonl": _jsonl, ".json": _json}
