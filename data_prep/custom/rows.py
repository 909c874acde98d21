"""Rows of your own dataset: their fields, in whatever file they are, and the splits they make."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from data_prep.annotation_files import parse_span
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    Captioned,
    RowError,
    name_problem,
    text_problem,
)
from data_prep.parquet_files import is_url
from data_prep.splits import draw_splits
from drl_jax.data.video import Span
from drl_jax.runtime.files import parse_json

FIELDS = ("video", "caption", "captions", "start", "end", "split")
_SPLITS = ("train", "val", "test")
# Other names of splits, and those that are meant.
_SYNONYMS = {
    **{"training": "train", "testing": "test", "evaluation": "test"},
    **{"validation": "val", "validate": "val", "valid": "val", "dev": "val"},
}


def missing_fields(present: Sequence[str], *, needed: str = "video") -> str:
    """Says which of the fields are missing: `caption` or `captions`, and `needed` unless empty."""
    missing = [] if not needed or needed in present else [needed]
    if not {"caption", "captions"} & set(present):
        missing.append("caption")
    if not missing:
        return ""
    return f"has no {' and no '.join(missing)}; it has {', '.join(present) or 'nothing'}"


def read_object(text: str) -> dict[str, Any]:
    """A JSON object, its names in lower case without blanks; RowError for anything else."""
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise RowError('is not an object: {"caption": ..}')
    fields: dict[str, Any] = {}
    for name, content in value.items():
        if (name := name.strip().lower()) in fields:
            raise RowError(f"has two fields {name!r}")
        fields[name] = content
    return fields


def video_of(row: dict[str, Any]) -> str:
    """The field `video`; RowError if it is empty, no text, a URL, or cannot be a name."""
    video = row.get("video")
    if video is not None and not isinstance(video, str):
        raise RowError(f"video must be a text, not {video!r}")
    if not (video := (video or "").strip()):
        raise RowError("video is empty")
    if is_url(video):
        raise RowError(
            f"video is a URL ({video}); download the files, and write their paths below --videos"
        )
    if problem := name_problem(video):
        raise RowError(f"video {problem}")
    return video


def span_of(row: dict[str, Any]) -> Span | None:
    """The fields `start` and `end`, seconds; RowError if they are no span."""
    start, end = row.get("start"), row.get("end")
    if _is_empty(end):
        if _is_empty(start):
            return None
        raise RowError("start is set but end is not")
    return parse_span(0.0 if _is_empty(start) else start, end)


def _is_empty(value: Any) -> bool:
    """Whether a cell has no value; pandas writes NaN for that."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def split_of(row: dict[str, Any], where: str) -> str:
    """The field `split`; empty if the row has none.

    A row with another word is refused, not left out: its whole split has the word.
    """
    split = str(row.get("split") or "").strip()
    if not split or split in _SPLITS:
        return split
    likely = _SYNONYMS.get(split.lower())
    likely = likely or next(iter(difflib.get_close_matches(split.lower(), _SPLITS, n=1)), None)
    hint = f"did you mean {likely}?" if likely else "a caption with a comma needs quotation marks"
    raise AnnotationError(f"{where}: {split!r} is not a split (train, val or test); {hint}")


def split_of_file(path: PurePath) -> str:
    """The split that begins the name of a file, or names a folder above it; empty if none does."""
    names = [re.split(r"[-_.\d]", path.name, maxsplit=1)[0], *(p.name for p in path.parents)]
    found = (_SYNONYMS.get(name.lower(), name.lower()) for name in names)
    return next((name for name in found if name in _SPLITS), "")


def has_caption(row: dict[str, Any]) -> bool:
    """Whether the fields `caption` or `captions` have anything, of whatever type."""
    caption = row.get("caption")
    is_blank = isinstance(caption, str) and not caption.strip()
    return bool((caption and not is_blank) or row.get("captions"))


def captions_of(row: dict[str, Any]) -> list[str]:
    """The fields `caption` and `captions`; RowError if one is empty or no text, or none is."""
    captions = row.get("captions") or []
    if isinstance(captions, str) or not isinstance(captions, list):
        raise RowError("captions must be a list")
    captions = [*([row["caption"]] if row.get("caption") else []), *captions]
    if wrong := [caption for caption in captions if not isinstance(caption, str)]:
        raise RowError(f"caption must be a text, not {wrong[0]!r}")
    if not captions or not all(caption.strip() for caption in captions):
        raise RowError("caption is empty")
    if problem := next(filter(None, map(text_problem, captions)), ""):
        raise RowError(f"caption {problem}")
    # A copy has no room for more, a fifth of the memory of a short caption.
    return [caption.strip() for caption in captions][:]


def annotations_of(
    where: object, splits: Mapping[str, Mapping[str, list[str]]], **fields: Any
) -> Annotations:
    """Annotations from the captions of each video of each split; "" has all videos, to be drawn."""
    if "" in splits and len(splits) > 1:
        raise AnnotationError(
            f"{where}: some rows have a split and others have none; set it in all rows or none"
        )
    captioned = {
        name: [Captioned(video_id, captions) for video_id, captions in videos.items()]
        for name, videos in splits.items()
    }
    annotations = Annotations(captioned, **fields)
    if "" in splits:
        draw_splits(annotations)
    return annotations
