"""Rows of your own dataset: their fields, in whatever file they are, and the splits they make."""

import dataclasses
import difflib
import hashlib
import heapq
import math
import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import PurePath
from typing import Any, Generic, TypeVar

from data_prep.annotation_files import parse_span
from data_prep.annotations import AnnotationError
from data_prep.parquet_files import is_url
from drl_jax.data.video import Span

FIELDS = ("video", "caption", "captions", "start", "end", "split")
_SPLITS = ("train", "val", "test")
# Other names of splits, and those that are meant.
_SYNONYMS = {
    **{"training": "train", "testing": "test", "evaluation": "test"},
    **{"validation": "val", "validate": "val", "valid": "val", "dev": "val"},
}
# Without splits, the fraction of files that becomes val, and the fraction that becomes test.
_HELD_OUT = 0.1

Video = TypeVar("Video", bound=Hashable)


def check_fields(where: object, present: Sequence[str], *, needed: str = "video") -> None:
    """Checks that the fields of a row, or the columns of a file, have what every row needs.

    Raises:
      AnnotationError: no video, or no caption.
    """
    missing = [] if not needed or needed in present else [needed]
    if not {"caption", "captions"} & set(present):
        missing.append("caption")
    if missing:
        raise AnnotationError(
            f"{where} has no {' and no '.join(missing)}; it has {', '.join(present) or 'nothing'}"
        )


def video_of(row: dict[str, Any], where: str) -> str:
    """The field `video`, without blanks around it."""
    video = row.get("video")
    if video is not None and not isinstance(video, str):
        raise AnnotationError(f"{where}: video must be a text, not {video!r}")
    if not (video or "").strip():
        raise AnnotationError(f"{where}: video is empty")
    if is_url(video.strip()):
        raise AnnotationError(
            f"{where}: video is a URL ({video.strip()}); download the files, and write their paths"
            " below --videos"
        )
    return video.strip()


def span_of(row: dict[str, Any], where: str) -> Span | None:
    """The fields `start` and `end`, seconds."""
    start, end = row.get("start"), row.get("end")
    if _is_empty(end):
        if _is_empty(start):
            return None
        raise AnnotationError(f"{where}: start is set but end is not")
    return parse_span(0.0 if _is_empty(start) else start, end, where)


def _is_empty(value: Any) -> bool:
    """Whether a cell has no value; pandas writes NaN for that."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def split_of(row: dict[str, Any], where: str) -> str:
    """The field `split`; empty if the row has none."""
    split = str(row.get("split") or "").strip()
    if not split or split in _SPLITS:
        return split
    likely = _SYNONYMS.get(split.lower())
    likely = likely or next(iter(difflib.get_close_matches(split.lower(), _SPLITS, n=1)), None)
    hint = f"did you mean {likely}?" if likely else "a caption with a comma needs quotation marks"
    raise AnnotationError(f"{where}: {split!r} is not a split (train, val or test); {hint}")


def split_of_file(path: PurePath) -> str:
    """The split in the name of a file, e.g. "train-00000-of-00016", or of a folder above it.

    Empty if there is none.
    """
    names = [re.split(r"[-_.\d]", path.name, maxsplit=1)[0], *(p.name for p in path.parents)]
    found = (_SYNONYMS.get(name.lower(), name.lower()) for name in names)
    return next((name for name in found if name in _SPLITS), "")


def captions_of(row: dict[str, Any], where: str) -> list[str]:
    """The fields `caption` and `captions`, without blanks around the texts."""
    captions = row.get("captions") or []
    if isinstance(captions, str) or not isinstance(captions, list):
        raise AnnotationError(f"{where}: captions must be a list")
    captions = [*([row["caption"]] if row.get("caption") else []), *captions]
    if wrong := [caption for caption in captions if not isinstance(caption, str)]:
        raise AnnotationError(f"{where}: caption must be a text, not {wrong[0]!r}")
    if not captions or not all(caption.strip() for caption in captions):
        raise AnnotationError(f"{where}: caption is empty")
    captions = [caption.strip() for caption in captions]
    return captions[:]  # A copy has no room for more, a fifth of the memory of a short caption.


@dataclasses.dataclass
class SplitRows(Generic[Video]):
    """Collects the captions of videos by split.

    Attributes:
      where: the files, for error messages.
    """

    where: object
    _splits: dict[str, dict[Video, list[str]]] = dataclasses.field(default_factory=dict)

    def add(self, video: Video, captions: list[str], split: str) -> None:
        """Adds captions of a video, which may have others in this split; "" is no split."""
        videos = self._splits.setdefault(split, {})
        if video in videos:
            videos[video].extend(captions)
        else:
            videos[video] = captions

    def splits(self, file_of: Callable[[Video], str]) -> dict[str, dict[Video, list[str]]]:
        """The captions of each video of each split.

        Args:
          file_of: file of a video. Without splits, all videos of a file are in the same one, which
            depends on the hash of its name.

        Raises:
          AnnotationError: some rows have a split, and others have none.
        """
        if "" not in self._splits:
            return self._splits
        if len(self._splits) > 1:
            raise AnnotationError(
                f"{self.where}: some rows have a split and others have none; set it in all rows or"
                " none"
            )
        videos = self._splits.pop("")
        files = {file_of(video) for video in videos}
        held_out = math.ceil(len(files) * _HELD_OUT) if len(files) >= 3 else 0
        first = heapq.nsmallest(
            2 * held_out,
            files,
            key=lambda file: hashlib.sha256(file.encode(errors="surrogatepass")).digest(),
        )
        held = {file: "val" if rank < held_out else "test" for rank, file in enumerate(first)}
        for video, captions in videos.items():
            self._splits.setdefault(held.get(file_of(video), "train"), {})[video] = captions
        return self._splits
