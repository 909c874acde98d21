"""WebDataset shards: tar files in which members with the same key are one sample.

The key of a member is its name up to the first dot after the last slash, and the rest is its
extension, as in the package `webdataset`.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from data_prep.annotations import AnnotationError, Annotations
from data_prep.custom.container_files import ContainedVideos, ContainerFiles
from data_prep.custom.rows import FIELDS, captions_of, span_of, split_of
from data_prep.tar_files import TarMember, read_content, read_members
from drl_jax.data.video import VIDEO_SUFFIXES

# Names without a key, e.g. ".hidden", are no part of a sample.
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)")


@dataclasses.dataclass(slots=True)
class _Sample:
    """Members of a key.

    Attributes:
      video: its video.
      texts: contents of its members with captions, by extension: "txt" or "json".
    """

    video: TarMember | None = None
    texts: dict[str, bytes] = dataclasses.field(default_factory=dict)


def read_shards(files: ContainerFiles) -> Annotations:
    """Reads the headers of WebDataset shards, and their members .txt and .json.

    The id of a video is the name of its shard without suffix, a slash, and its key. A sample with a
    video but no caption is not annotated; one with a caption but no video is missing.

    Raises:
      AnnotationError: a member is wrong, or there is no video with a caption.
      TarError: a tar file is damaged, truncated or compressed.
      OSError: it cannot be read.
    """
    videos, count = ContainedVideos(files), 0
    for path, name, split in files.each():
        shard = name[: -len(path.suffix)]
        for key, sample in _samples(path).items():
            count += _add(videos, f"{shard}/{key}", sample, f"{path}, {key}", split)
        videos.end_file(name)
    if not count:
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
        key, extension = found[1], found[2].lower()
        is_video = f".{extension.rpartition('.')[2]}" in VIDEO_SUFFIXES
        if not is_video and extension not in ("txt", "json"):
            continue
        if not member.isfile():
            raise AnnotationError(
                f"{path}: {member.name} is a link, not a file; pack the tar file again with"
                " --dereference --hard-dereference"
            )
        sample = samples.setdefault(key.removeprefix("./"), _Sample())
        if extension in sample.texts or (is_video and sample.video is not None):
            kind = "videos" if is_video else f"members .{extension}"
            raise AnnotationError(
                f"{path}: {member.name} and another member have the key {key!r}, which is the name"
                f" up to its first dot; a key has one of the {kind}"
            )
        if is_video:
            sample.video = TarMember(path, member.name, member.offset_data, member.size)
        else:
            sample.texts[extension] = read_content(path, tar, member)
    return samples


def _add(
    videos: ContainedVideos, video_id: str, sample: _Sample, where: str, split_of_file: str
) -> bool:
    """Adds a sample; returns whether it is a video with captions."""
    row = _row(sample, where)
    if not row.get("caption") and not row.get("captions"):
        if sample.video is not None:
            videos.add_unannotated(sample.video)
        return False
    captions = list(dict.fromkeys(captions_of(row, where)))
    videos.add(
        video_id,
        captions,
        split_of(row, where) or split_of_file,
        sample.video,
        span_of(row, where),
        missing=f"its shard has its {' and '.join(sample.texts)}, but no video",
    )
    return sample.video is not None


def _row(sample: _Sample, where: str) -> dict[str, Any]:
    """Fields of a sample: those of its .json, and the text of its .txt as a caption."""
    row: dict[str, Any] = {}
    if "json" in sample.texts:
        try:
            fields = json.loads(_text(sample.texts["json"], f"{where}.json"))
        except (ValueError, RecursionError) as error:
            raise AnnotationError(f"{where}.json is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise AnnotationError(f'{where}.json is not an object: {{"caption": ..}}')
        fields = {name.strip().lower(): value for name, value in fields.items()}
        row = {name: value for name, value in fields.items() if name in FIELDS}
    if isinstance(row.get("caption"), str) and not row["caption"].strip():
        del row["caption"]
    text = _text(sample.texts.get("txt", b""), f"{where}.txt").strip()
    if text and row.get("caption") and isinstance(row.get("captions") or [], list):
        row["captions"] = [text, *(row.get("captions") or [])]
    elif text:
        row["caption"] = text
    return row


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{where} is not text in UTF-8; save it as UTF-8") from error
