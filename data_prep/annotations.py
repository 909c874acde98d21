"""What the annotation files of a dataset say: captioned videos in splits, and where they lie."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from drl_jax.data.video import VIDEO_SUFFIXES, Span
from drl_jax.runtime.errors import UserError


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


def look_for_pairs(
    directory: Path, files: Mapping[str, tuple[str, str]]
) -> tuple[Annotations, dict[str, tuple[Path, Path]]]:
    """As `look_for`, where a split has a file of ids and one of captions.

    Args:
      directory: of the files.
      files: the two names for each split.

    Returns:
      Annotations without splits yet, and both paths for each split that has both.

    Raises:
      AnnotationError: there is no such directory.
    """
    uses = {name: f"the split {split}" for split, pair in files.items() for name in pair}
    annotations = look_for(directory, uses)
    return annotations, {
        split: (directory / ids, directory / captions)
        for split, (ids, captions) in files.items()
        if not annotations.missing_files.keys() & {ids, captions}
    }


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
