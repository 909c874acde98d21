"""Datasets as earlier versions wrote them."""

import json
import shutil
from pathlib import Path

from drl_jax.data.records import VideoDataset
from drl_jax.runtime.files import sha256


def splits_in_json(dataset: VideoDataset) -> dict[str, dict[str, list]]:
    """The splits of a dataset as `metadata.json` had them, and as their hash has them."""
    splits = {name: dataset.split(name) for name in dataset.split_names}
    return {
        name: {
            "videos": split.videos.tolist(),
            "captions": list(split.captions),
            "reversed_pairs": split.reversed_pairs.tolist(),
        }
        for name, split in splits.items()
    }


def rewrite_as_layout_1(directory: Path) -> None:
    """Moves ids, sources and captions of a dataset to `metadata.json`, where they were."""
    dataset = VideoDataset(directory)
    metadata = {
        "video_ids": list(dataset.video_ids),
        "sources": list(dataset.sources),
        "splits": splits_in_json(dataset),
    }
    manifest = dataset.manifest
    del manifest["content_with_captions"]
    for path in directory.glob("*.arrow"):
        del manifest["files"][path.name]
        path.unlink()
    shutil.rmtree(directory / "tokens")
    (directory / "metadata.json").write_text(json.dumps(metadata))
    manifest["files"]["metadata.json"] = sha256(directory / "metadata.json")
    (directory / "manifest.json").write_text(json.dumps(manifest))
