"""Datasets of a few files: their captions, and the arguments of the commands that read them."""

from pathlib import Path

from data_prep.annotations import Annotations
from data_prep.datasets import builder_class


def read_custom(path: Path, content: str | bytes | None = None) -> Annotations:
    """Reads the annotations of the dataset `custom`, after writing this content."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return builder_class("custom").read_annotations(path)


def captions_of(annotations: Annotations) -> dict[str, dict[str, list[str]]]:
    """The captions by split and video."""
    return {
        name: {entry.video_id: entry.captions for entry in split}
        for name, split in annotations.splits.items()
    }


def custom(root: Path, annotations: Path | str, data_dir: Path, *extra: str) -> list[str]:
    """Arguments of `build` and `check`; `annotations` and the folder `videos` are below `root`."""
    sources = (f"--videos={root / 'videos'}", f"--annotations={root / annotations}")
    return ["custom", *sources, f"--data_dir={data_dir}", *extra]
