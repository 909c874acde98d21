"""Manifest of a built dataset: what it was built from, in `manifest.json` beside the records.

It contains nothing that differs between two builds of the same files (no dates, no paths), so two
builds can be compared: equal `content` means equal frames, equal `annotations` equal captions.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from av import ffmpeg_version_info

from data_prep.annotations import Annotations
from data_prep.frame_cache import Frames, decoder_versions
from drl_jax.data.storage import StorageSpec
from drl_jax.runtime.files import sha256

# For each split, the minimum and maximum "videos" and "captions" that publications report.
PublishedSizes = Mapping[str, Mapping[str, tuple[int, int]]]


class ContentHash:
    """Running hash of the stored videos: ids and frames, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, video_id: str, frames: Frames) -> None:
        """Adds a video."""
        self._hash.update(video_id.encode() + b"\0")
        for frame in frames:
            self._hash.update(frame)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def make_manifest(
    dataset: str,
    storage: StorageSpec,
    annotations: Annotations,
    stored: Collection[str],
    unusable: Mapping[str, str],
    published: PublishedSizes,
    content: ContentHash,
    directory: Path,
    *,
    protocols: Mapping[str, str],
) -> dict[str, Any]:
    """Makes the manifest of a dataset.

    Args:
      dataset: its name.
      storage: its storage variant.
      annotations: its annotations.
      stored: ids of the stored videos.
      unusable: reasons why the other videos are left out, by id.
      published: see `PublishedSizes`.
      content: hash of the stored videos.
      directory: of the dataset, complete but for the manifest.
      protocols: what publications call the protocol of a split, by its name.
    """
    splits = count_splits(annotations, stored, published)
    for name in splits.keys() & protocols.keys():
        splits[name]["protocol"] = protocols[name]
    return {
        "dataset": dataset,
        "settings": {
            "image_size": storage.form.size,
            "max_frames": storage.max_frames,
            "storage": storage.encoding,
            **storage.form.changed_fields(),
        },
        "annotations": annotation_hashes(annotations),
        "missing_files": annotations.missing_files,
        "content": content.hexdigest(),
        "files": _hashes([*directory.glob("*.json"), *directory.glob("*.arrow")]),
        "videos": len(stored),
        "left_out": dict(unusable),
        "splits": splits,
        "versions": {
            "python": platform.python_version(),
            "ffmpeg": ffmpeg_version_info,
            **decoder_versions(),
            **{
                package: importlib.metadata.version(package)
                for package in ("numpy", "pyarrow", "tensorflow-datasets", "drl_jax")
            },
        },
    }


def _hashes(files: Iterable[Path]) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(files)}


def annotation_hashes(annotations: Annotations) -> dict[str, str]:
    """Hashes of the annotation files, by name."""
    return _hashes(annotations.files) | annotations.hashes


def annotation_changes(
    manifest: Mapping[str, Any], annotations: Annotations, *, named_by_user: bool
) -> list[str]:
    """Compares a dataset's annotation files with those of a new build.

    Args:
      manifest: of the dataset; empty if it has none.
      annotations: what the new build reads.
      named_by_user: whether the names of the files say nothing about their content, so that a file
        with another name is the same. (A list of videos for training is none for testing.)

    Returns:
      For each file that differs, its name and how: "has changed", "is new" or "is missing".
    """
    if not manifest:
        return []
    before, now = manifest.get("annotations", {}), annotation_hashes(annotations)
    if named_by_user and sorted(before.values()) == sorted(now.values()):
        return []
    return [
        *(f"{name} has changed" for name in now if before.get(name, now[name]) != now[name]),
        *(f"{name} is new" for name in now if name not in before),
        *(f"{name} is missing" for name in before if name not in now),
    ]


def count_splits(
    annotations: Annotations, usable: Collection[str], published: PublishedSizes
) -> dict[str, dict[str, Any]]:
    """Sizes of the splits: annotated, usable, and published where publications agree."""
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
    """One line for a report: sizes of a split that were found and that were expected."""
    of_annotated = ""
    if split["videos"] != split["annotated_videos"]:
        of_annotated = f"of {split['annotated_videos']:,} annotated "
    line = f"{name}: {split['videos']:,} {of_annotated}videos, {split['captions']:,} captions"
    for unit, (low, high) in split["published"].items():
        expected = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        agrees = low <= split[unit] <= high
        line += f"; {unit} as published" if agrees else f"; published {unit}: {expected}"
    return line
