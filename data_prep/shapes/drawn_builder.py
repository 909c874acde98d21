"""Datasets that the build draws: videos, and their captions in `annotations.json`."""

import abc
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from data_prep.annotation_files import read_json
from data_prep.annotations import Annotations, Captioned
from data_prep.retrieval_builder import RetrievalBuilder
from data_prep.shapes import draw as draw_module
from data_prep.shapes.draw import draw_file
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_text
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes

# Captions by video of each split, and pairs of a clip and another order of its frames.
_ANNOTATIONS = "annotations.json"
# Hash of the scenes and of the module that draws them.
_DIGEST = "drawing.sha256"


class DrawnBuilder(RetrievalBuilder):
    """Stores videos that `draw` makes, and their captions."""

    MAX_WORDS: ClassVar[int] = 24
    # The videos stay in the data directory, and decoding them again is cheap.
    HAS_CACHE: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def draw(cls, directory: Path, size: str) -> None:
        """Draws the files (`draw_files`) of a size, a key of the sizes in `datasets.DRAWN`."""

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        content = read_json(path / _ANNOTATIONS, dict)
        splits = {
            split: [Captioned(video, captions) for video, captions in videos.items()]
            for split, videos in content["splits"].items()
        }
        return Annotations(splits, files=[path / _ANNOTATIONS], reversed_pairs=content["pairs"])


def draw_files(
    directory: Path,
    splits: Mapping[str, Sequence[Any]],
    *,
    draw: Callable[[Any, int], list[np.ndarray]],
    caption: Callable[[Any], list[str]],
    pairs: Mapping[str, Sequence[tuple[int, int]]] = {},
) -> None:
    """Draws videos into `directory/videos/SPLIT/*.mp4`, and writes their captions to `directory`.

    Existing videos of the same drawing are kept, so an interrupted call can continue. Those of
    another version of this program are drawn again. Two calls must not draw into one directory at
    once (the build has a lock).

    `draw` returns the frames of an item, given a seed; worker processes import it. `caption` is
    called once for each item, in order; videos of `val` and `test` have its first caption only.
    `pairs` are indices of two items of the same frames, which get the same seed.
    """
    drawings: list[tuple[Path, Callable, Any, int]] = []
    captions: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}, "test": {}}
    reversals: dict[str, list[tuple[str, str]]] = {}
    for split, members in splits.items():
        # Absolute: FFmpeg takes a colon in the first part of a path for the end of a protocol.
        folder, first = directory.absolute() / "videos" / split, len(drawings)
        names = [f"video{first + index}" for index in range(len(members))]
        drawn_as = {other: one for one, other in pairs.get(split, ())}
        for index, (name, item) in enumerate(zip(names, members, strict=True)):
            drawings.append(
                (folder / f"{name}.mp4", draw, item, first + drawn_as.get(index, index))
            )
            texts = caption(item)
            captions[split][name] = texts if split == "train" else texts[:1]
        if split in pairs:
            reversals[split] = [(names[one], names[other]) for one, other in pairs[split]]
    items = [(path.parent.name, item) for path, _, item, _ in drawings]
    _remove_other_drawing(directory, f"{items} {[seed for *_, seed in drawings]}")
    absent = [drawing for drawing in drawings if not drawing[0].exists()]
    drawn = map_in_processes(draw_file, absent)
    for (path, *_), result in zip(
        absent, tqdm(drawn, "drawing", len(absent), unit="video"), strict=True
    ):
        if isinstance(result, WorkerFailure):
            raise UserError(f"cannot draw {path}: {result.reason}")
    content = {"splits": captions, "pairs": reversals}
    write_text(directory / _ANNOTATIONS, json.dumps(content))


def _remove_other_drawing(directory: Path, content: str) -> None:
    """Removes videos that were not drawn from this content by the code of this version."""
    code = Path(draw_module.__file__).read_bytes()
    digest = hashlib.sha256(code + content.encode()).hexdigest()
    marker = directory / _DIGEST
    if marker.exists() and marker.read_text(encoding="utf-8") == digest:
        return
    videos = directory / "videos"
    if videos.exists():
        try:
            shutil.rmtree(videos)
        except OSError as error:
            raise UserError(
                f"cannot remove the videos of another version in {videos}: {error.strerror};"
                " rerun the command when the cause is removed"
            ) from error
    directory.mkdir(parents=True, exist_ok=True)
    write_text(marker, digest)
