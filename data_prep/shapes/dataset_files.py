"""Draws the files of a synthetic dataset: videos, and annotations in the formats of MSR-VTT."""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.annotation_files import read_sentences
from data_prep.annotations import Annotations, group_captions, with_all_captions
from data_prep.csv_files import read_csv_columns
from data_prep.shapes import draw as draw_module
from data_prep.shapes.draw import draw_file
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import replacing, write_text
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes

_SENTENCES = "SHAPES_data.json"
_TRAIN, _VAL, _TEST = "SHAPES_train.csv", "SHAPES_val.csv", "SHAPES_test.csv"
_PAIRS = {"val": "SHAPES_val_pairs.csv", "test": "SHAPES_test_pairs.csv"}
# Hash of the scenes and of the module that draws them.
_DIGEST = "drawing.sha256"


def draw_files(
    directory: Path,
    splits: Mapping[str, Sequence[Any]],
    *,
    draw: Callable[[Any, int], list[np.ndarray]],
    caption: Callable[[Any], list[str]],
    pairs: Mapping[str, Sequence[tuple[int, int]]] = {},
) -> None:
    """Draws videos into `directory/videos/SPLIT/*.mp4`, and writes annotations to `directory`.

    Existing videos of the same drawing are kept, so an interrupted call can continue. Those of
    another version of this program are drawn again. Two calls must not draw into one directory at
    once (the build has a lock).

    Args:
      directory: created if it does not exist.
      splits: what to draw for train, val and test.
      draw: returns the frames of an item, given a seed. Worker processes import it.
      caption: returns the captions of an item; called once for each, in order.
      pairs: for some splits, indices of items and their time reversals, which get the same seed.

    Raises:
      UserError: videos of another version cannot be removed, or one cannot be written.
    """
    items = [(split, item) for split, members in splits.items() for item in members]
    names = [f"video{number}" for number in range(len(items))]
    numbered_pairs, seeds = {}, list(range(len(items)))
    first = 0
    for split, members in splits.items():
        numbered_pairs[split] = [
            (first + one, first + other) for one, other in pairs.get(split, ())
        ]
        first += len(members)
        for one, other in numbered_pairs[split]:
            seeds[other] = seeds[one]
    _remove_other_drawing(directory, f"{items} {seeds}")
    drawings = [
        # Absolute: FFmpeg takes a colon in the first part of a path for the end of a protocol.
        (directory.absolute() / "videos" / split / f"{name}.mp4", draw, item, seed)
        for (split, item), name, seed in zip(items, names, seeds, strict=True)
    ]
    absent = [drawing for drawing in drawings if not drawing[0].exists()]
    drawn = map_in_processes(draw_file, absent)
    for (path, *_), result in zip(
        absent, tqdm(drawn, "drawing", len(absent), unit="video"), strict=True
    ):
        if isinstance(result, WorkerFailure):
            raise UserError(f"cannot draw {path}: {result.reason}")
    _write_annotations(directory, items, names, numbered_pairs, caption)


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


def _write_annotations(
    directory: Path,
    items: list[tuple[str, Any]],
    names: list[str],
    pairs: dict[str, list[tuple[int, int]]],
    caption: Callable[[Any], list[str]],
) -> None:
    sentences = [caption(item) for _, item in items]
    by_split: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for number, (split, _) in enumerate(items):
        by_split[split].append(number)
    numbered = [
        (name, sentence) for name, group in zip(names, sentences, strict=True) for sentence in group
    ]
    document = {
        "videos": [
            {"video_id": name, "split": split}
            for name, (split, _) in zip(names, items, strict=True)
        ],
        "sentences": [
            {"video_id": name, "caption": sentence, "sen_id": number}
            for number, (name, sentence) in enumerate(numbered)
        ],
    }
    write_text(directory / _SENTENCES, json.dumps(document))
    _write_csv(directory / _TRAIN, ("video_id",), ((names[n],) for n in by_split["train"]))
    for file, split in ((_VAL, "val"), (_TEST, "test")):
        _write_csv(
            directory / file,
            ("key", "vid_key", "video_id", "sentence"),
            (
                (f"ret{row}", f"shape{n}", names[n], sentences[n][0])
                for row, n in enumerate(by_split[split])
            ),
        )
    for split, file in _PAIRS.items():
        _write_csv(
            directory / file,
            ("video_id", "reversed_id"),
            ((names[one], names[other]) for one, other in pairs[split]),
        )


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    with (
        replacing(path) as unfinished,
        unfinished.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def read_files(directory: Path) -> Annotations:
    """Reads the annotations that `draw_files` wrote.

    Raises:
      AnnotationError: a file is missing or damaged.
    """
    left_out: dict[str, str] = {}

    def columns(file: str, *names: str) -> list[tuple[str, ...]]:
        return read_csv_columns(directory / file, names, left_out)

    sentences = directory / _SENTENCES
    captions_of = read_sentences(sentences, left_out)
    train = [video for (video,) in columns(_TRAIN, "video_id")]
    splits = {
        "train": with_all_captions(train, captions_of, directory / _TRAIN, sentences, left_out)
    }
    for split, file in (("val", _VAL), ("test", _TEST)):
        splits[split] = group_captions(columns(file, "video_id", "sentence"))
    pairs = {split: columns(file, "video_id", "reversed_id") for split, file in _PAIRS.items()}
    files = [directory / name for name in (_SENTENCES, _TRAIN, _VAL, _TEST, *_PAIRS.values())]
    return Annotations(splits, files=files, reversed_pairs=pairs, left_out=left_out)
