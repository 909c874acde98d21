"""Sizes of a dataset: numbers of videos and captions, and disk space."""

from collections.abc import Collection, Mapping
from typing import Any

from data_prep.annotations import Annotations
from drl_jax.data.storage import StorageSpec

# For each split, the minimum and maximum "videos" and "captions" that publications report.
PublishedSizes = Mapping[str, Mapping[str, tuple[int, int]]]
# Measured on 15 real clips: 253,224 bytes for 12 JPEG frames of 224 x 224, quality 95, 4:4:4.
_JPEG_BYTES_PER_PIXEL = 253224 / (12 * 224 * 224)


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
    """One line for a report: sizes of a split (`count_splits`) that were found and expected."""
    of_annotated = ""
    if split["videos"] != split["annotated_videos"]:
        of_annotated = f"of {split['annotated_videos']:,} annotated "
    line = f"{name}: {split['videos']:,} {of_annotated}videos, {split['captions']:,} captions"
    for unit, (low, high) in split["published"].items():
        expected = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        agrees = low <= split[unit] <= high
        line += f"; {unit} as published" if agrees else f"; published {unit}: {expected}"
    return line


def stored_bytes(frames: int, storage: StorageSpec) -> int:
    """Estimated size in bytes of a total number of stored frames."""
    per_pixel = 3 if storage.encoding == "raw" else _JPEG_BYTES_PER_PIXEL
    return int(frames * storage.form.size**2 * per_pixel)


def format_bytes(count: int) -> str:
    """Formats a size as "1.2 GB", or as "3 MB" below 0.1 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
