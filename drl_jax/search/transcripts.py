"""Transcripts beside videos: what is said in them, or written in their pictures, with its times.

`talk.srt`, `talk.vtt` and `talk.json` belong to `talk.mp4`, and so do `talk.en.srt` and
`talk.mp4.srt`. Libraries for these formats refuse files that players read, or keep the names and
notes of WebVTT as if they were said.
"""

import collections
import html
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from drl_jax.search.reading import file_of, path_of

_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
_TIME = r"(?:(\d{1,6}):)?(\d{1,6}):(\d{1,6}(?:[.,]\d{1,9})?)"
_TIMES = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")
# HTML and the times of words in WebVTT, not "a < b"; styles of SubRip.
_MARKS = re.compile(r"</?[A-Za-z0-9][^<>]*>|\{\\[^{}]*\}")
_MAX_BYTES, _MAX_SECONDS = 50_000_000, 1e9


class Cue(NamedTuple):
    """A line of a transcript, `file`, at some seconds, which may be behind the end of its video."""

    start: float
    end: float
    text: str
    file: str = ""


class Transcript(NamedTuple):
    """A transcript of a video, both with paths of an index; one may belong to several videos."""

    video: str
    path: str
    size: int
    mtime_ns: int
    file: Path


def find_transcripts(folder: Path, videos: Iterable[str]) -> Iterator[Transcript]:
    """Yields the transcripts beside some videos of a folder; lists only the folders of these."""
    folders: dict[str, dict[str, list[str]]] = collections.defaultdict(dict)
    for video in videos:
        parent, _, name = video.rpartition("/")
        for stem in (name, PurePosixPath(name).stem):
            folders[parent].setdefault(stem, []).append(video)
    for parent, of_stem in folders.items():
        try:
            entries = list(os.scandir(file_of(folder, parent)))
        except (FileNotFoundError, NotADirectoryError):  # Its videos are gone.
            continue
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = path_of(entry.name)
            stem, _, suffix = name.rpartition(".")
            if f".{suffix.lower()}" not in _READERS or not entry.is_file():
                continue
            base, _, language = stem.rpartition(".")
            if stem not in of_stem and _LANGUAGE.fullmatch(language):
                stem = base
            path, status = str(PurePosixPath(parent, name)), entry.stat()
            known = (path, status.st_size, status.st_mtime_ns, Path(entry.path))
            yield from (Transcript(video, *known) for video in of_stem.get(stem, ()))


def read_transcript(path: Path) -> list[Cue]:
    """The cues of a transcript, in its order; those without a word are left out.

    The text is UTF-8, UTF-16 with its mark, or else Latin-1. Raises ValueError, with a line, if it
    is no transcript; OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"is larger than {_MAX_BYTES // 1_000_000} MB")
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    found = []
    for start, end, said in _READERS[path.suffix.lower()](text):
        said = html.unescape(_MARKS.sub("", said))
        # NUL, which ends a text of SQLite, and halves of characters that JSON can name.
        said = said.replace("\0", " ").encode("utf-8", "replace").decode()
        if said := " ".join(said.split()):
            found.append(Cue(start, max(start, end), said))
    return found


def _read_lines(text: str) -> Iterator[tuple[float, float, str]]:
    """SubRip and WebVTT: lines with times, and the text up to an empty line or the next times."""
    cues: list[tuple[float, float, list[str]]] = []
    said: list[str] = []
    for line in text.splitlines():
        if times := _TIMES.match(line):
            if len(said) > 1 and said[-1].strip().isdecimal():
                said.pop()  # The number of this cue, without an empty line before it.
            said = []
            cues.append((_seconds(*times.groups()[:3]), _seconds(*times.groups()[3:]), said))
        elif line.strip():
            said.append(line)
        else:
            said = []  # What follows is in no cue.
    if not cues and text.strip() and not text.lstrip().startswith("WEBVTT"):
        raise ValueError("has no line like 00:01:02,500 --> 00:01:04,000")
    return ((start, end, " ".join(said)) for start, end, said in cues)


def _seconds(hours: str | None, minutes: str, seconds: str) -> float:
    return 3600 * int(hours or 0) + 60 * int(minutes) + float(seconds.replace(",", "."))


def _read_json(text: str) -> Iterator[tuple[float, float, str]]:
    """Whisper's object with `segments`, or their list."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("is no JSON") from error
    if isinstance(value, dict) and "segments" not in value:
        return  # What a camera or a downloader writes about a video.
    segments = value["segments"] if isinstance(value, dict) else value
    for number, segment in enumerate(segments if isinstance(segments, list) else [None]):
        match segment:
            case {"start": int() | float() as start, "end": int() | float() as end, "text": str()}:
                if 0 <= start < _MAX_SECONDS and 0 <= end < _MAX_SECONDS:
                    yield float(start), float(end), segment["text"]
                    continue
        raise ValueError(f"has no start, end and text in segment {number}")


_READERS = {".srt": _read_lines, ".vtt": _read_lines, ".json": _read_json}
