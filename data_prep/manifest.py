"""What a built dataset is made of: `manifest.json`, stored with it.

It holds nothing that differs between two builds of the same files (no date, no path), so that two
people can compare theirs: equal `content` means equal frames, equal `annotations` equal captions.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Collection, Mapping
from typing import Any

from av import ffmpeg_version_info

from data_prep.annotations import Annotations
from data_prep.frame_cache import Frames, decoder_versions


class ContentHash:
    """A running hash over stored videos: names and frames, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, video_id: str, frames: Frames) -> None:
        self._hash.update(video_id.encode() + b"\0")
        for frame in frames:
            self._hash.update(frame)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def make_manifest(
    dataset: str,
    settings: Mapping[str, Any],
    annotations: Annotations,
    stored: Collection[str],
    unusable: Mapping[str, str],
    published: Mapping[str, Mapping[str, tuple[int, int]]],
    content: ContentHash,
) -> dict[str, Any]:
    """The manifest of a dataset that was just decoded.

    Args:
      dataset: its name.
      settings: the stored form.
      annotations: what its annotation files say.
      stored: ids of the videos that could be stored.
      unusable: why the others could not, by id.
      published: for a split, the least and the most "videos" and "captions" of publications.
      content: hash over what is stored.
    """
    return {
        "dataset": dataset,
        "settings": dict(settings),
        "annotations": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(annotations.files)
        },
        "missing_files": annotations.missing_files,
        "content": content.hexdigest(),
        "videos": len(stored),
        "left_out": dict(unusable),
        "splits": count_splits(annotations, stored, published),
        "versions": {
            "python": platform.python_version(),
            "ffmpeg": ffmpeg_version_info,
            **decoder_versions(),
            **{
                package: importlib.metadata.version(package)
                for package in ("numpy", "tensorflow-datasets", "drl_jax")
            },
        },
    }


def count_splits(
    annotations: Annotations,
    usable: Collection[str],
    published: Mapping[str, Mapping[str, tuple[int, int]]],
) -> dict[str, dict[str, Any]]:
    """Sizes of the splits: annotated, usable, and published where publications agree on them."""
    splits = {}
    for name, captioned in annotations.splits.items():
        kept = [entry for entry in captioned if entry.video_id in usable]
        splits[name] = {
            "annotated_videos": len(captioned),
            "videos": len(kept),
            "captions": sum(len(entry.captions) for entry in kept),
            "published": {unit: list(sizes) for unit, sizes in published.get(name, {}).items()},
        }
    return splits


def describe_split(name: str, split: Mapping[str, Any]) -> str:
    """A split's line of a report: what was found beside what was expected."""
    of_annotated = ""
    if split["videos"] != split["annotated_videos"]:
        of_annotated = f"of {split['annotated_videos']:,} annotated "
    line = f"{name}: {split['videos']:,} {of_annotated}videos, {split['captions']:,} captions"
    for unit, (low, high) in split["published"].items():
        expected = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        agrees = low <= split[unit] <= high
        line += f"; {unit} as published" if agrees else f"; published {unit}: {expected}"
    return line
