"""WebDataset shards: tar files in which members with the same key are one sample.

The key of a member is its name up to the first dot after the last slash, and the rest is its
extension, as in the package `webdataset`.
"""

import dataclasses
import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.annotations import AnnotationError, Annotations, RowError, name_problem
from data_prep.custom.container_files import ContainedVideos, ContainerFiles
from data_prep.custom.rows import FIELDS, captions_of, read_object, span_of, split_of
from data_prep.tar_files import MAX_CONTENT, TarMember, read_content, read_members
from drl_jax.data.video import VIDEO_SUFFIXES

# Names without a key, e.g. ".hidden", are no part of a sample.
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)


@dataclasses.dataclass(slots=True)
class _Sample:
    """Members of a key.

    Attributes:
      members: name and position of its video (".") and of its members with captions, by extension:
        "txt" or "json".
      video: its video.
      texts: contents of its members with captions, by extension.
      problem: why one of its members cannot be used.
    """

    members: dict[str, str] = dataclasses.field(default_factory=dict)
    video: TarMember | None = None
    texts: dict[str, bytes] = dataclasses.field(default_factory=dict)
    problem: str = ""


def read_shards(files: ContainerFiles) -> Annotations:
    """Reads the headers of WebDataset shards, and their members .txt and .json.

    The id of a video is the name of its shard without suffix, a slash, and its key. A sample with a
    video but no caption is not annotated; one with a caption but no video is missing; one with a
    member that cannot be used is left out.

    Raises:
      AnnotationError: two members are the video of a key, or its captions; a word is no split; or
        there is no video with a caption, or most are left out.
      TarError: a tar file is damaged, truncated or compressed.
      OSError: it cannot be read.
    """
    videos, count, left_out = ContainedVideos(files), 0, 0
    for path, name, split in files.each():
        shard = name[: -len(path.suffix)]
        for key, sample in _samples(path).items():
            video_id = f"{shard}/{key}"
            try:
                count += _add(videos, video_id, sample, f"{path}, {key}", split)
            except RowError as error:
                videos.leave_out(video_id, str(error))
                left_out += 1
        videos.end_file(name)
    if not count and not left_out:
        raise AnnotationError(
            f"{files.named} has no video with a caption: each needs members of one name, e.g."
            " 0001.mp4 with 0001.txt or 0001.json"
        )
    return videos.annotations()


def _samples(path: Path) -> dict[str, _Sample]:
    """The samples of a shard by key, in the order of their first members."""
    samples: dict[str, _Sample] = {}
    for member, tar in read_members(path):
        if not (found := _NAME.fullmatch(member.name)) or member.isdir():
            continue
        key, extension = found[1].removeprefix("./"), found[2].lower()
        is_video = f".{extension.rpartition('.')[2]}" in VIDEO_SUFFIXES
        if not is_video and extension not in ("txt", "json"):
            continue
        sample = samples.setdefault(key, _Sample())
        role, name = "." if is_video else extension, f"{member.name} at byte {member.offset}"
        if (other := sample.members.setdefault(role, name)) != name:
            kind = "videos" if is_video else f"members .{extension}"
            raise AnnotationError(
                f"{path}: {other} and {name} have the key {key!r}, which is the name up to its"
                f" first dot; a key has one of the {kind}"
            )
        if problem := _problem(member):
            sample.problem = sample.problem or f"its .{found[2]} {problem}"
        elif is_video:
            sample.video = TarMember(path, member.name, member.offset_data, member.size)
        else:
            sample.texts[extension] = read_content(path, tar, member)
    return samples


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


def _add(
    videos: ContainedVideos, video_id: str, sample: _Sample, where: str, split_of_file: str
) -> bool:
    """Adds a sample; returns whether it is a video with captions."""
    if sample.problem:
        raise RowError(sample.problem)
    row = _row(sample)
    if not row.get("caption") and not row.get("captions"):
        if sample.video is not None and "txt" in sample.texts:
            raise RowError("its .txt is empty")
        if sample.video is not None:
            videos.add_unannotated(sample.video)
        return False
    captions = list(dict.fromkeys(captions_of(row)))
    videos.add(
        video_id,
        captions,
        split_of(row, where) or split_of_file,
        sample.video,
        span_of(row),
        missing=f"its shard has its {' and '.join(sample.texts)}, but no video",
    )
    return sample.video is not None


def _row(sample: _Sample) -> dict[str, Any]:
    """Fields of a sample: those of its .json, and the text of its .txt as a caption."""
    row: dict[str, Any] = {}
    if "json" in sample.texts:
        try:
            fields = read_object(_text(sample.texts["json"]))
        except RowError as error:
            raise RowError(f"its .json {error}") from error
        row = {name: value for name, value in fields.items() if name in FIELDS}
    if isinstance(row.get("caption"), str) and not row["caption"].strip():
        del row["caption"]
    text = _text(sample.texts.get("txt", b"")).strip()
    if text and row.get("caption") and isinstance(row.get("captions") or [], list):
        row["captions"] = [text, *(row.get("captions") or [])]
    elif text:
        row["caption"] = text
    return row


def _text(content: bytes) -> str:
    """The text; `captions_of` refuses bytes that are none."""
    return content.decode("utf-8-sig", "surrogateescape")
