"""WebDataset shards: tar files in which members with the same key are one sample.

The key of a member is its name up to the first dot after the last slash, and the rest is its
extension, as in the package `webdataset`.
"""

import dataclasses
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.annotations import AnnotationError, Annotations, RowError, name_problem
from data_prep.custom.container_files import ContainerFiles, Sample, contained_annotations
from data_prep.custom.rows import FIELDS, captions_of, has_caption, read_object
from data_prep.tar_files import MAX_CONTENT, TarMember, read_content, read_members
from drl_jax.data.video_file import VIDEO_SUFFIXES

# Names without a key, e.g. ".hidden", are no part of a sample.
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)


@dataclasses.dataclass(slots=True)
class _Members:
    """Members of a key: its video, contents of those with captions by extension ("txt" or "json"),
    name and position of each ("." is the video), and why one of them cannot be used.
    """

    places: dict[str, str] = dataclasses.field(default_factory=dict)
    video: TarMember | None = None
    texts: dict[str, bytes] = dataclasses.field(default_factory=dict)
    problem: str = ""


def read_shards(files: ContainerFiles) -> Annotations:
    """Reads the headers of WebDataset shards, and their members .txt and .json.

    The id of a video is the name of its shard without suffix, a slash, and its key.
    """
    hint = ": each needs members of one name, e.g. 0001.mp4 with 0001.txt or 0001.json"
    return contained_annotations(files, _read_shard, hint)


def _read_shard(path: Path, name: str) -> Iterator[Sample]:
    for key, members in _members_by_key(path).items():
        video_id = f"{name[: -len(path.suffix)]}/{key}"
        try:
            row: dict[str, Any] | RowError = _row(members)
        except RowError as error:
            row = error
        missing = f"its shard has its {' and '.join(members.texts)}, but no video"
        yield Sample(video_id, f"{path}, {key}", video_id, row, members.video or missing)


def _members_by_key(path: Path) -> dict[str, _Members]:
    """In the order of the first members of the keys."""
    found: dict[str, _Members] = {}
    for member, tar in read_members(path):
        if not (match := _NAME.fullmatch(member.name)) or member.isdir():
            continue
        key, extension = match[1].removeprefix("./"), match[2].lower()
        is_video = f".{extension.rpartition('.')[2]}" in VIDEO_SUFFIXES
        if not is_video and extension not in ("txt", "json"):
            continue
        members = found.setdefault(key, _Members())
        role, place = "." if is_video else extension, f"{member.name} at byte {member.offset}"
        if (other := members.places.setdefault(role, place)) != place:
            kind = "videos" if is_video else f"members .{extension}"
            raise AnnotationError(
                f"{path}: {other} and {place} have the key {key!r}, which is the name up to its"
                f" first dot; a key has one of the {kind}"
            )
        if problem := _problem(member):
            members.problem = members.problem or f"its .{match[2]} {problem}"
        elif is_video:
            members.video = TarMember(path, member.name, member.offset_data, member.size)
        else:
            members.texts[extension] = read_content(path, tar, member)
    return found


def _problem(member: tarfile.TarInfo) -> str:
    """Why a member cannot be used."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        return f"leads out of the folder by its name, {member.name}"
    if problem := name_problem(member.name):
        return problem
    if member.issparse():
        return "is stored as a sparse file; pack the tar file again without --sparse"
    if member.islnk() or member.issym():
        return (
            "is a link, not a file; pack the tar file again with --dereference --hard-dereference"
        )
    if not member.isfile():
        return "is a device or a pipe, not a file"
    if member.size > MAX_CONTENT and member.name.lower().endswith((".txt", ".json")):
        return f"has {member.size / 1e6:.0f} MB, too much for a text"
    return ""


def _row(members: _Members) -> dict[str, Any]:
    """Fields of a sample: those of its .json, and the distinct captions of it and of its .txt."""
    if members.problem:
        raise RowError(members.problem)
    row: dict[str, Any] = {}
    if "json" in members.texts:
        try:
            fields = read_object(_text(members.texts["json"]))
        except RowError as error:
            raise RowError(f"its .json {error}") from error
        row = {name: value for name, value in fields.items() if name in FIELDS}
    if isinstance(row.get("caption"), str) and not row["caption"].strip():
        del row["caption"]
    text = _text(members.texts.get("txt", b"")).strip()
    if text and row.get("caption") and isinstance(row.get("captions") or [], list):
        row["captions"] = [text, *(row.get("captions") or [])]
    elif text:
        row["caption"] = text
    if has_caption(row):
        return {**row, "caption": None, "captions": list(dict.fromkeys(captions_of(row)))}
    if members.video is not None and "txt" in members.texts:
        raise RowError("its .txt is empty")
    return row


def _text(content: bytes) -> str:
    """The text; `captions_of` refuses bytes that are none."""
    return content.decode("utf-8-sig", "surrogateescape")
