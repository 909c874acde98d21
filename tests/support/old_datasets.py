"""Datasets as earlier versions wrote them."""

import json
import shutil
from pathlib import Path

from drl_jax.data.records import VideoDataset
from drl_jax.runtime.files import sha256


def rewrite_as_layout_1(directory: Path) -> None:
    """Moves ids, sources and captions of a dataset to `metadata.json`, where they were."""
    dataset = VideoDataset(directory)
    splits = {name: dataset.split(name) for name in dataset.split_names}
    metadata = {
        "video_ids": list(dataset.video_ids),
        "sources": list(dataset.sources),
        "splits": {
            name: {
                "videos": split.videos.tolist(),
                "captions": list(split.captions),
                "reversed_pairs": split.reversed_pairs.tolist(),
            }
            for name, split in splits.items()
        },
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
