"""Default dataset: synthetic clips, annotated in the file formats of MSR-VTT."""

import collections
import csv
import json
import random
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from data_prep.annotation_files import read_csv_columns, read_sentences
from data_prep.annotations import (
    Annotations,
    group_captions,
    with_all_captions,
)
from data_prep.retrieval_builder import RetrievalBuilder
from data_prep.shapes.draw import draw_file
from data_prep.shapes.scenes import SIZES, Scene, captions, split_scenes
from drl_jax.data.storage import StorageSpec
from drl_jax.runtime.files import replacing, write_text
from drl_jax.runtime.worker_pool import map_in_processes

_CAPTIONS = 20
_SEED = 0
_SENTENCES = "SHAPES_data.json"
_TRAIN, _VAL, _TEST = "SHAPES_train.csv", "SHAPES_val.csv", "SHAPES_test.csv"
_PAIRS = "SHAPES_test_pairs.csv"


class Builder(RetrievalBuilder):
    """Two coloured shapes, each with its own motion; half of the test clips are pairs that differ
    only in the direction of one motion."""

    DEFAULT_STORAGE = StorageSpec(64, 4, "raw")
    MAX_WORDS = 24
    # The clips stay in the data directory, and decoding them again is cheap.
    KEEPS_CACHE = False

    @classmethod
    def read_annotations(cls, path: Path) -> Annotations:
        captions_of = read_sentences(path / _SENTENCES)
        train = [video for (video,) in read_csv_columns(path / _TRAIN, ("video_id",))]
        splits = {"train": with_all_captions(train, captions_of, path / _TRAIN, path / _SENTENCES)}
        for split, file in (("val", _VAL), ("test", _TEST)):
            splits[split] = group_captions(read_csv_columns(path / file, ("video_id", "sentence")))
        pairs = read_csv_columns(path / _PAIRS, ("video_id", "reversed_id"))
        files = [path / name for name in (_SENTENCES, _TRAIN, _VAL, _TEST, _PAIRS)]
        return Annotations(splits, files=files, reversed_pairs={"test": pairs})


def draw_dataset(directory: Path, size: str) -> None:
    """Draws the clips into `directory/videos/SPLIT/*.mp4`, and writes annotations to `directory`.

    The files depend only on the size. Existing clips are kept, so an interrupted call can continue.

    Args:
      directory: created if it does not exist.
      size: a key of `SIZES`.
    """
    splits = split_scenes(*SIZES[size], seed=_SEED)
    clips = [
        (split, scene) for split in ("train", "val", "test") for scene in getattr(splits, split)
    ]
    names = [f"video{number}" for number in range(len(clips))]
    first_test = len(splits.train) + len(splits.val)
    pairs = [(first_test + a, first_test + b) for a, b in splits.test_pairs]
    # A clip and its reverse have the same seed, and therefore the same frames.
    seeds = list(range(len(clips)))
    for one, other in pairs:
        seeds[other] = seeds[one]

    for split in ("train", "val", "test"):
        (directory / "videos" / split).mkdir(parents=True, exist_ok=True)
    drawings = [
        (directory / "videos" / split / f"{name}.mp4", scene, seed)
        for (split, scene), name, seed in zip(clips, names, seeds, strict=True)
    ]
    absent = [drawing for drawing in drawings if not drawing[0].exists()]
    drawn = map_in_processes(draw_file, absent)
    collections.deque(tqdm(drawn, "drawing", len(absent), unit="video"), maxlen=0)
    _write_annotations(directory, clips, names, pairs)


def _write_annotations(
    directory: Path,
    clips: list[tuple[str, Scene]],
    names: list[str],
    pairs: list[tuple[int, int]],
) -> None:
    rng = random.Random(_SEED)
    sentences = [captions(scene, _CAPTIONS, rng) for _, scene in clips]
    by_split: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for number, (split, _) in enumerate(clips):
        by_split[split].append(number)
    document = {
        "videos": [
            {"video_id": name, "split": split}
            for name, (split, _) in zip(names, clips, strict=True)
        ],
        "sentences": [
            {"video_id": name, "caption": caption, "sen_id": number * _CAPTIONS + k}
            for number, name in enumerate(names)
            for k, caption in enumerate(sentences[number])
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
    _write_csv(
        directory / _PAIRS,
        ("video_id", "reversed_id"),
        ((names[one], names[other]) for one, other in pairs),
    )


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    with (
        replacing(path) as unfinished,
        unfinished.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
