"""Your own dataset, described by one CSV or JSONL file."""

import collections
import difflib
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.annotation_files import numbered_lines, parse_span
from data_prep.annotations import (
    AnnotationError,
    Annotations,
    Source,
    group_captions,
)
from data_prep.csv_files import read_csv_rows
from data_prep.retrieval_builder import RetrievalBuilder

_FIELDS = ("video", "caption", "captions", "start", "end", "split")
_SPLITS = ("train", "val", "test")
# Other names of splits, and those that are meant.
_SYNONYMS = {
    **{"training": "train", "testing": "test", "evaluation": "test"},
    **{"validation": "val", "validate": "val", "valid": "val", "dev": "val"},
}
# Without splits, the fraction of files that becomes val, and the fraction that becomes test.
_HELD_OUT = 0.1


class Builder(RetrievalBuilder):
    """Videos and captions listed in a file.

    A row has `video` (path below the videos' folder, or file name), `caption` or a list `captions`,
    and optionally `start` and `end` (seconds or h:mm:ss) and `split` (train, val or test). Rows
    with the same video and span are one video with several captions. Without splits, a tenth of
    the files becomes val and a tenth test, chosen by the hash of their names.
    """

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        if not path.is_file():
            raise AnnotationError(f"no file {path}; --annotations must be a .csv or .jsonl file")
        rows = list(_read_rows(path))
        if not rows:
            raise AnnotationError(f"{path} has no rows")
        row_sources = [_source(row, where) for where, row in rows]
        ids = _video_ids(row_sources)
        sources = {video_id: (source,) for source, video_id in ids.items()}
        by_split: dict[str, list[tuple[str, str]]] = {}
        unassigned: list[tuple[str, str]] = []
        for (where, row), source in zip(rows, row_sources, strict=True):
            pairs = [(ids[source], caption) for caption in _captions(row, where)]
            split = _split(row, where)
            (by_split.setdefault(split, []) if split else unassigned).extend(pairs)
        if unassigned and by_split:
            raise AnnotationError(
                f"{path}: some rows have a split and others have none; set it in all rows or none"
            )
        if unassigned:
            by_split = _assign_splits(unassigned, sources)
        splits = {name: group_captions(pairs) for name, pairs in by_split.items()}
        return Annotations(splits, files=[path], sources=sources)


def _read_rows(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yields where each row is, for error messages, and its fields."""
    if path.suffix.lower() == ".json":
        raise AnnotationError(
            f"{path} cannot be read: --annotations must be a .csv or .jsonl file (one JSON object"
            " per line)"
        )
    return _read_jsonl(path) if path.suffix.lower() == ".jsonl" else _read_csv(path)


def _read_csv(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    present, rows = read_csv_rows(path)
    _check_fields(path, present)
    for number, row in rows:
        where = f"{path}, row {number}"
        row = {name: value for name, value in row.items() if name in _FIELDS}
        if row.get("captions"):
            try:
                row["captions"] = json.loads(row["captions"])
            except (ValueError, RecursionError) as error:
                raise AnnotationError(
                    f'{where}: captions must be a JSON list such as ["one", "two"]; with'
                    " one caption per row, name the column caption"
                ) from error
        yield where, row


def _read_jsonl(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AnnotationError(f"{where} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise AnnotationError(f'{where} is not an object: {{"video": .., "caption": ..}}')
        row = {name.strip().lower(): value for name, value in row.items()}
        _check_fields(where, list(row))
        yield where, row


def _check_fields(where: str | Path, present: list[str]) -> None:
    missing = [] if "video" in present else ["video"]
    if not {"caption", "captions"} & set(present):
        missing.append("caption")
    if missing:
        raise AnnotationError(
            f"{where} has no {' and no '.join(missing)}; it has {', '.join(present) or 'nothing'}"
        )


def _source(row: dict[str, Any], where: str) -> Source:
    video = row.get("video")
    if video is not None and not isinstance(video, str):
        raise AnnotationError(f"{where}: video must be a text, not {video!r}")
    if not (video or "").strip():
        raise AnnotationError(f"{where}: video is empty")
    start, end = row.get("start"), row.get("end")
    if start in (None, "") and end in (None, ""):
        return Source(video.strip())
    if end in (None, ""):
        raise AnnotationError(f"{where}: start is set but end is not")
    return Source(video.strip(), parse_span(0.0 if start in (None, "") else start, end, where))


def _video_ids(sources: Iterable[Source]) -> dict[Source, str]:
    """A distinct id of each source: its file, followed by the span if it has one.

    Seconds have six digits, and all digits where six are the same for two spans.
    """
    short = {source: _short_id(source) for source in sources}
    counts = collections.Counter(short.values())
    return {
        source: video_id if counts[video_id] == 1 else _exact_id(source)
        for source, video_id in short.items()
    }


def _short_id(source: Source) -> str:
    if source.span is None:
        return source.file
    return f"{source.file}@{source.span[0]:g}-{source.span[1]:g}"


def _exact_id(source: Source) -> str:
    if source.span is None:
        return source.file
    return f"{source.file}@{source.span[0]!r}-{source.span[1]!r}"


def _split(row: dict[str, Any], where: str) -> str:
    """Split of a row; empty if it has none."""
    split = str(row.get("split") or "").strip()
    if not split or split in _SPLITS:
        return split
    likely = _SYNONYMS.get(split.lower())
    likely = likely or next(iter(difflib.get_close_matches(split.lower(), _SPLITS, n=1)), None)
    hint = f"did you mean {likely}?" if likely else "a caption with a comma needs quotation marks"
    raise AnnotationError(f"{where}: {split!r} is not a split (train, val or test); {hint}")


def _captions(row: dict[str, Any], where: str) -> list[str]:
    captions = row.get("captions") or []
    if isinstance(captions, str) or not isinstance(captions, list):
        raise AnnotationError(f"{where}: captions must be a list")
    captions = [*([row["caption"]] if row.get("caption") else []), *captions]
    if wrong := [caption for caption in captions if not isinstance(caption, str)]:
        raise AnnotationError(f"{where}: caption must be a text, not {wrong[0]!r}")
    if not captions or not all(caption.strip() for caption in captions):
        raise AnnotationError(f"{where}: caption is empty")
    return [caption.strip() for caption in captions]


def _assign_splits(
    pairs: list[tuple[str, str]], sources: dict[str, tuple[Source, ...]]
) -> dict[str, list[tuple[str, str]]]:
    """Assigns splits by file, so that all clips cut from a file are in the same split."""
    files = sorted(
        {sources[video][0].file for video, _ in pairs},
        key=lambda file: hashlib.sha256(file.encode(errors="surrogatepass")).digest(),
    )
    held_out = math.ceil(len(files) * _HELD_OUT) if len(files) >= 3 else 0
    split_of = {
        file: "val" if rank < held_out else "test" if rank < 2 * held_out else "train"
        for rank, file in enumerate(files)
    }
    by_split: dict[str, list[tuple[str, str]]] = {}
    for video, caption in pairs:
        by_split.setdefault(split_of[sources[video][0].file], []).append((video, caption))
    return by_split
