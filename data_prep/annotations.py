"""What an annotation directory says: splits of (video, captions), and where the videos are."""

import csv
import dataclasses
import json
from pathlib import Path

from drl_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov")


class AnnotationError(UserError):
    """Annotation files that cannot be used; the message says which, why and what to do."""


@dataclasses.dataclass(frozen=True)
class Captioned:
    """A video of a split with its captions."""

    video_id: str
    captions: list[str]


@dataclasses.dataclass
class Annotations:
    """Everything that annotation files say.

    Attributes:
      splits: captioned videos of each split; a video may stand in several.
      reversed_pairs: for each split, pairs of ids of a clip and the same clip played backwards.
      missing_files: files that the dataset can have and this directory has not, with what they are
        for.
    """

    splits: dict[str, list[Captioned]]
    reversed_pairs: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    missing_files: dict[str, str] = dataclasses.field(default_factory=dict)

    def video_ids(self) -> list[str]:
        """Every video once, in the order of the splits."""
        return list(dict.fromkeys(v.video_id for split in self.splits.values() for v in split))


def read_csv_columns(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The named columns of a csv file with a header, row by row.

    Raises:
      AnnotationError: a column is missing, or the file is empty or not text.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            present = reader.fieldnames or []
            for column in columns:
                if column not in present:
                    raise AnnotationError(
                        f"{path} has no column {column!r}; its first line is"
                        f" {','.join(present) or 'empty'!r}"
                    )
            rows = [tuple((row[column] or "").strip() for column in columns) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise AnnotationError(f"{path} is not a csv file in UTF-8 ({error})") from error
    for number, row in enumerate(rows, start=2):
        if not all(row):
            raise AnnotationError(f"{path}, row {number}: {' or '.join(columns)} is empty")
    return rows


def read_sentences(path: Path) -> dict[str, list[str]]:
    """Captions by video from MSR-VTT's JSON, `{"videos": [...], "sentences": [...]}`.

    Raises:
      AnnotationError: not JSON, or not of this form.
    """
    try:
        sentences = json.loads(path.read_text(encoding="utf-8"))["sentences"]
        captions: dict[str, list[str]] = {}
        for sentence in sentences:
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AnnotationError(f"{path} is not a JSON file ({error})") from error
    except (KeyError, TypeError) as error:
        raise AnnotationError(
            f'{path} does not have MSR-VTT\'s form, {{"sentences": [{{"video_id": .., "caption":'
            f" ..}}, ..]}} ({type(error).__name__}: {error})"
        ) from error
    return captions


def with_all_captions(
    video_ids: list[str], captions: dict[str, list[str]], csv_path: Path, json_path: Path
) -> list[Captioned]:
    """The videos that a csv lists with the captions that a JSON has.

    Raises:
      AnnotationError: a listed video has no caption.
    """
    if without := [video for video in video_ids if video not in captions]:
        raise AnnotationError(
            f"{len(without)} videos of {csv_path} have no sentence in {json_path} (the first:"
            f" {without[0]}); the two files do not belong together"
        )
    return [Captioned(video, captions[video]) for video in dict.fromkeys(video_ids)]


def group_captions(rows: list[tuple[str, str]]) -> list[Captioned]:
    """(video, caption) rows, one query each, with the rows of a video put together."""
    captions: dict[str, list[str]] = {}
    for video, caption in rows:
        captions.setdefault(video, []).append(caption)
    return [Captioned(video, sentences) for video, sentences in captions.items()]


def find_videos(directory: Path) -> dict[str, Path]:
    """Video files below a directory by name without suffix.

    Raises:
      AnnotationError: there is no such directory, or no video in it.
    """
    if not directory.is_dir():
        raise AnnotationError(f"no directory {directory}; --videos names the folder of the videos")
    found = {
        path.stem: path
        for path in sorted(directory.rglob("*"))
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    }
    if not found:
        raise AnnotationError(
            f"no video in {directory} (looked for {' '.join(VIDEO_SUFFIXES)} in all its folders)"
        )
    return found
