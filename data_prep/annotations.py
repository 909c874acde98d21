"""Annotations of a dataset: captioned videos by split, and the files and spans they come from."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from drl_jax.data.video import VIDEO_SUFFIXES, Span
from drl_jax.runtime.errors import UserError, printable

if TYPE_CHECKING:
    from data_prep.locations import FoundVideos


# A row, a member of a tar file or a video that cannot be used is left out and listed. A build ends
# if that is more than this share of a file's rows, or of the videos.
MAX_LOST = 0.5


class AnnotationError(UserError):
    """Annotation files or source videos that cannot be used."""


@dataclasses.dataclass(frozen=True, slots=True)
class Captioned:
    """A video of a split, with its captions."""

    video_id: str
    captions: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """File, or part of a file, that an annotated video is read from.

    Attributes:
      file: path below the videos' folder, or file name, with or without suffix.
      span: start and end in seconds; None: the whole file.
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
      reversed_pairs: for each split, pairs of ids of a clip and its time reversal.
      missing_files: optional annotation files that are missing, with their purpose.
      hashes: hashes, by name, of what was read from files that are too large to be hashed.
      contained: the videos, if they are inside these files.
      left_out: reasons, by place in the files, for rows and members that cannot be used.
      drawn: whether the splits were drawn by `draw_splits`; otherwise the files state them.
      place_of: the row that names a video of a split first, from its id and the split; None: a
        place that an id and a split do not tell.
    """

    splits: dict[str, list[Captioned]]
    files: list[Path] = dataclasses.field(default_factory=list)
    sources: dict[str, tuple[Source, ...]] = dataclasses.field(default_factory=dict)
    reversed_pairs: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    missing_files: dict[str, str] = dataclasses.field(default_factory=dict)
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    contained: "FoundVideos | None" = None
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    drawn: bool = False
    place_of: Callable[[str, str], str] | None = None

    def video_ids(self) -> list[str]:
        """Ids of all videos, without duplicates, in split order."""
        return list(dict.fromkeys(v.video_id for split in self.splits.values() for v in split))

    def sources_of(self, video_id: str) -> tuple[Source, ...]:
        """Candidate sources of a video, in order of preference."""
        return self.sources.get(video_id, (Source(video_id),))


def find_annotation_files(directory: Path, files: Mapping[str, str]) -> Annotations:
    """Looks for a dataset's annotation files.

    Args:
      directory: directory of the files.
      files: purpose of each file, by file name.

    Returns:
      Annotations without splits, with `files` and `missing_files` filled in.

    Raises:
      AnnotationError: the directory does not exist.
    """
    if not directory.is_dir():
        raise AnnotationError(
            f"no directory {directory}; --annotations must be the folder of the annotation files"
        )
    missing = {name: purpose for name, purpose in files.items() if not (directory / name).is_file()}
    present = [directory / name for name in files if name not in missing]
    return Annotations({}, files=present, missing_files=missing)


def find_annotation_pairs(
    directory: Path, files: Mapping[str, tuple[str, str]]
) -> tuple[Annotations, dict[str, tuple[Path, Path]]]:
    """Like `find_annotation_files`, for splits that have one file of ids and one of captions.

    Args:
      directory: directory of the files.
      files: names of the two files of each split.

    Returns:
      Annotations without splits, and the two paths of each split that has both files.

    Raises:
      AnnotationError: the directory does not exist.
    """
    purposes = {name: f"the split {split}" for split, pair in files.items() for name in pair}
    annotations = find_annotation_files(directory, purposes)
    return annotations, {
        split: (directory / ids, directory / captions)
        for split, (ids, captions) in files.items()
        if not annotations.missing_files.keys() & {ids, captions}
    }


def require_splits(annotations: Annotations, directory: Path) -> Annotations:
    """Returns the annotations if they have at least one split, and videos in every split.

    Raises:
      AnnotationError: they have no split, or a split has no videos.
    """
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

    Args:
      video_ids: the list; a repeated id counts once.
      captions: of the other file.
      list_path: where the list is.
      captions_path: where the captions are.
      left_out: receives the reason for each video without a caption.

    Raises:
      AnnotationError: more than `MAX_LOST` of the videos have no caption.
    """
    video_ids = list(dict.fromkeys(video_ids))
    if without := [video for video in video_ids if not captions.get(video)]:
        bare = {without_video_suffix(name): name for name, found in captions.items() if found}
        similar = [bare.get(without_video_suffix(video)) for video in without]
        hints = [
            f", which names it {name!r}, with another suffix" if name else "" for name in similar
        ]
        if len(without) > MAX_LOST * len(video_ids):
            raise AnnotationError(
                f"{len(without)} of the {len(video_ids)} videos of {list_path} have no caption in"
                f" {captions_path} (the first: {without[0]!r}{hints[0]}); check that the two files"
                " belong together"
            )
        for video, hint in zip(without, hints, strict=True):
            place = f"{list_path.name}, {printable(video)}"
            left_out[place] = f"no caption in {captions_path.name}{hint}"
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
