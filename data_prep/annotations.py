"""Annotations of a dataset: captioned videos by split, their files and spans, what is left out.

All functions that read annotations raise AnnotationError, with the place and what to do, for files
that cannot be used.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from data_prep.locations import FoundVideos
from drl_jax.data.video import Span
from drl_jax.data.video_file import VIDEO_SUFFIXES
from drl_jax.runtime.errors import UserError, printable

# A row, a member of a tar file or a video that cannot be used is left out and listed. A build ends
# if that is more than this share of a file's rows, or of the videos.
MAX_LOST = 0.5

Item = TypeVar("Item")
Parsed = TypeVar("Parsed")


class AnnotationError(UserError):
    """Annotation files or source videos that cannot be used."""


class RowError(AnnotationError):
    """A row, or a member of a tar file, that is left out. The message does not name it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Captioned:
    """A video of a split, with its captions."""

    video_id: str
    captions: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """File, or a span of it in seconds, that an annotated video is read from.

    The file is a path below the videos' folder, or a name, with or without suffix.
    """

    file: str
    span: Span | None = None


@dataclasses.dataclass
class Annotations:
    """Contents of a dataset's annotation files.

    Attributes:
      splits: captioned videos of each split; a video may be in several splits.
      files: the annotation files that were read, but for those in `hashes`.
      sources: candidate sources by video id, in order of preference, for videos that are not a
        whole file named after their id.
      reversed_pairs: for each split, pairs of ids of a clip and its time reversal, or another
        order of its frames.
      missing_files: optional annotation files that are missing, with their purpose.
      hashes: hashes, by name, of what was read from files that are too large to be hashed.
      contained: the videos, if they are inside these files.
      left_out: reasons, by place in the files, for rows and members that cannot be used.
      drawn: whether the splits were drawn by `draw_splits`; otherwise the files state them.
    """

    splits: dict[str, list[Captioned]]
    files: list[Path] = dataclasses.field(default_factory=list)
    sources: dict[str, tuple[Source, ...]] = dataclasses.field(default_factory=dict)
    reversed_pairs: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    missing_files: dict[str, str] = dataclasses.field(default_factory=dict)
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    contained: FoundVideos | None = None
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    drawn: bool = False

    def video_ids(self) -> list[str]:
        """Ids of all videos, without duplicates, in split order."""
        return list(dict.fromkeys(v.video_id for split in self.splits.values() for v in split))

    def sources_of(self, video_id: str) -> tuple[Source, ...]:
        """Candidate sources of a video, in order of preference."""
        return self.sources.get(video_id, (Source(video_id),))


# ---------------------------------------------------------------- published annotation files


def find_files(
    directory: Path, files: Mapping[str, tuple[str, ...]]
) -> tuple[Annotations, dict[str, tuple[Path, ...]]]:
    """Looks for the files, by name, that each split is read from.

    Returns annotations without splits, and the files of each split that has all of them.
    """
    if not directory.is_dir():
        raise AnnotationError(
            f"no directory {directory}; --annotations must be the folder of the annotation files"
        )
    needed: dict[str, list[str]] = {}
    for split, names in files.items():
        for name in names:
            needed.setdefault(name, []).append(split)
    present = {name: directory / name for name in needed if (directory / name).is_file()}
    missing = {n: f"the split {', '.join(s)}" for n, s in needed.items() if n not in present}
    found = {
        split: tuple(present[name] for name in names)
        for split, names in files.items()
        if not missing.keys() & set(names)
    }
    return Annotations({}, files=list(present.values()), missing_files=missing), found


def require_splits(annotations: Annotations, directory: Path) -> Annotations:
    """Returns the annotations if they have at least one split, and videos in every split."""
    if not annotations.splits:
        missing = (f"{name} ({purpose})" for name, purpose in annotations.missing_files.items())
        raise AnnotationError(
            f"no split can be read from {directory}: missing {', '.join(missing)}"
        )
    if empty := [name for name, videos in annotations.splits.items() if not videos]:
        files = ", ".join(str(path) for path in annotations.files)
        raise AnnotationError(f"the split {empty[0]} has no videos; check {files}")
    return annotations


def with_all_captions(
    video_ids: Iterable[str],
    captions: Mapping[str, list[str]],
    list_path: Path,
    captions_path: Path,
    left_out: dict[str, str],
) -> list[Captioned]:
    """Combines a list of videos with the captions from another file.

    A repeated id counts once. Videos without a caption are left out, at most `MAX_LOST` of them.
    """
    video_ids = list(dict.fromkeys(video_ids))
    if without := [video for video in video_ids if not captions.get(video)]:
        if len(without) > MAX_LOST * len(video_ids):
            raise AnnotationError(
                f"{len(without)} of the {len(video_ids)} videos of {list_path} have no caption in"
                f" {captions_path} (the first: {without[0]!r}); check that the two files"
                " belong together"
            )
        for video in without:
            place = f"{list_path.name}, {printable(video)}"
            left_out[place] = f"no caption in {captions_path.name}"
    return [Captioned(video, captions[video]) for video in video_ids if captions.get(video)]


def group_captions(rows: Iterable[tuple[str, str]]) -> list[Captioned]:
    """Groups (video, caption) rows by video."""
    captions: dict[str, list[str]] = {}
    for video, caption in rows:
        captions.setdefault(video, []).append(caption)
    return [Captioned(video, sentences) for video, sentences in captions.items()]


def without_video_suffix(name: str) -> str:
    """Removes a video suffix, or a dot at the end, from a file name; other dots are kept."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and (not suffix or f".{suffix.lower()}" in VIDEO_SUFFIXES) else name


# ---------------------------------------------------------------- what is left out


def check_lost(
    lost: Mapping[str, str], kept: int, what: str, remedy: str = "correct or remove them"
) -> None:
    """Refuses `what`, e.g. "rows of mine.csv", if none is kept or more than `MAX_LOST` is lost."""
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


def parse_rows(
    path: Path,
    kind: str,
    rows: Iterable[tuple[object, Item]],
    parse: Callable[[Item], Parsed],
    left_out: dict[str, str],
    form: str = "",
) -> list[Parsed]:
    """Parses the named rows of a file; `left_out` receives the reasons of those that are wrong.

    `parse` raises RowError, AttributeError, KeyError or TypeError for them. Messages say that a
    `kind`, e.g. "row", is not of this `form`.
    """
    parsed, lost = [], {}
    for name, row in rows:
        place = f"{path.name}, {kind} {name}"
        try:
            parsed.append(parse(row))
        except RowError as error:
            lost[place] = str(error)
        except (AttributeError, KeyError, TypeError):
            lost[place] = f"is not {form}"
    plural = "entries" if kind == "entry" else f"{kind}s"
    check_lost(lost, len(parsed), f"{plural} of {path}")
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
    """Leaves out the videos whose ids or captions cannot be stored, and returns their ids."""
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
