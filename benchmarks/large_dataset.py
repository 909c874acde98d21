"""Opening a dataset of many captions and clips: seconds, memory and bytes on disk.

    python -m benchmarks.large_dataset [--sizes=50000x20,10000000x1] [--record]

A size is CLIPSxCAPTIONS of each. The dataset is written by the code of the build, except that
nothing is decoded (every clip has the same frame of one pixel), and that a caption that was
tokenised is not tokenised again. There are a million different captions: with more, they repeat.
A process of its own then opens the dataset and reads training batches.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from benchmarks.measure import arguments, names, report

BATCH, BATCHES, WORDS, HOLDOUT = 128, 100, 32, 500
_DIFFERENT = 1_000_000
_THINGS = ("man", "woman", "child", "dog", "horse", "cook", "dancer", "singer", "team", "driver")
_ACTIONS = (
    *("rides a bicycle down the street", "plays the guitar on a stage", "cuts an onion"),
    *("runs across a green field", "talks to the camera", "swims in the sea at night"),
)


def caption_text(number: int) -> str:
    """One of the different captions."""
    number %= _DIFFERENT
    thing, action = _THINGS[number % 10], _ACTIONS[number % 6]
    return f"a {thing} in a red shirt {action} while {number} people watch"


class _Lazy(Sequence):
    """Makes an entry when it is accessed, so that only the build's own lists take memory."""

    def __init__(self, length: int, make: Callable):
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int):
        return self._make(range(self._length)[number])


def write_dataset(data_dir: Path, clips: int, captions: int) -> tuple[Path, float]:
    """Writes a dataset with one split, `train`.

    Args:
      data_dir: an empty directory.
      clips: number of clips.
      captions: of each clip.

    Returns:
      Its directory, and the seconds that it took.
    """
    import data_prep.retrieval_builder as builder_module
    from data_prep.annotations import Annotations, Captioned
    from data_prep.custom.custom_dataset_builder import Builder
    from data_prep.decode import Decoded
    from data_prep.video_folder import Clip, Plan
    from drl_jax.data.frame_form import FrameForm
    from drl_jax.data.storage import StorageSpec
    from drl_jax.models.tokenizers import CLIPTokenizer

    known: dict[str, list[int]] = {}

    class Remembering(CLIPTokenizer):
        def _encode(self, captions: Sequence[str], max_words: int) -> Iterator[list[int]]:
            for caption in captions:
                if caption not in known:
                    (known[caption],) = super()._encode([caption], max_words)
                yield known[caption]

    def clip(number: int) -> Clip:
        return Clip(f"clip{number:08d}", folder / f"part{number // 1000:05d}.mp4", (0.0, 10.0))

    def captioned(number: int) -> Captioned:
        first = number * captions
        return Captioned(
            f"clip{number:08d}", [caption_text(first + place) for place in range(captions)]
        )

    folder, frames = Path("videos"), np.zeros((1, 1, 1, 3), np.uint8)
    annotations = Annotations({"train": _Lazy(clips, captioned)})
    plan = Plan(annotations, folder, _Lazy(clips, clip), {}, [])
    storage = builder_module.StorageConfig.of(StorageSpec(FrameForm(1), 1, "raw"))
    builder = Builder(data_dir=data_dir, config=storage, file_format="array_record")
    start = time.perf_counter()
    with (
        mock.patch.object(
            builder_module, "decode_clips", lambda clips, **_: (Decoded(frames) for _ in clips)
        ),
        mock.patch.object(builder_module, "CLIPTokenizer", Remembering),
    ):
        builder.store(plan, data_dir / "cache", timeout=1)
    return Path(builder.data_dir), time.perf_counter() - start


def memory_mb() -> dict[str, float]:
    """Memory of this process in MB: the peak, and what it does not share with others."""
    fields = dict(
        line.split(":")
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    return {name: int(fields[name].split()[0]) / 1e3 for name in ("VmHWM", "RssAnon")}


def measure(directory: Path) -> dict:
    """Opens a dataset in this process and reads training batches; returns a row of the record."""
    import tensorflow_datasets  # noqa: F401  # Opening imports it, which takes a second.

    from drl_jax.config import DataConfig
    from drl_jax.data.batches import TrainBatches, load_split
    from drl_jax.data.records import VideoDataset
    from drl_jax.models.tokenizers import CLIPTokenizer

    jax.devices()
    data = DataConfig(
        train_split="train", max_words=WORDS, max_frames=1, storage="raw", cache="none", holdout=0
    )
    before, start, start_cpu = memory_mb(), time.perf_counter(), time.process_time()
    row = {}

    def passed(name: str) -> None:
        nonlocal start, start_cpu
        now, now_cpu = time.perf_counter(), time.process_time()
        row[f"{name}_s"], row[f"{name}_cpu_s"] = (
            round(now - start, 2),
            round(now_cpu - start_cpu, 2),
        )
        start, start_cpu = time.perf_counter(), time.process_time()

    dataset = VideoDataset(directory)
    passed("open")
    split = load_split(dataset, "train", data)
    passed("split")
    opened = memory_mb()
    batches = TrainBatches(dataset, split, data, BATCH, 0, CLIPTokenizer())
    stream = batches.iterate(0, 0, 1)
    next(stream)
    passed("first_batch")
    for _ in range(BATCHES):
        next(stream)
    passed(f"next_{BATCHES}_batches")
    read = memory_mb()
    rest = load_split(dataset, "train", DataConfig(train_split="train", holdout=HOLDOUT))
    passed("holdout")
    held_out = memory_mb()
    assert len(rest.videos) == len(split.videos) - HOLDOUT
    return {
        **row,
        "open_peak_mb": round(opened["VmHWM"] - before["VmHWM"]),
        "open_private_mb": round(opened["RssAnon"] - before["RssAnon"]),
        "batches_private_mb": round(read["RssAnon"] - before["RssAnon"]),
        "holdout_private_mb": round(held_out["RssAnon"] - read["RssAnon"]),
        "open_files": len(list(Path("/proc/self/fd").iterdir())),
    }


def _bytes(directory: Path, pattern: str) -> float:
    return round(sum(path.stat().st_size for path in directory.rglob(pattern)) / 1e6, 1)


def measure_size(size: str, parent: Path | None) -> dict:
    """Writes a dataset and measures it in a process of its own."""
    clips, captions = map(int, size.split("x"))
    data_dir = Path(tempfile.mkdtemp(prefix="large_dataset_", dir=parent))
    try:
        directory, write_seconds = write_dataset(data_dir, clips, captions)
        command = [sys.executable, "-m", "benchmarks.large_dataset", f"--open={directory}"]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return {
            "clips": clips,
            "captions": clips * captions,
            "shards": len(list(directory.glob("*.array_record*"))),
            **json.loads(finished.stdout.splitlines()[-1]),
            "json_mb": _bytes(directory, "*.json"),
            "arrow_mb": _bytes(directory, "*.arrow"),
            "tokens_mb": _bytes(directory, "*.npy"),
            "write_s": round(write_seconds),
        }
    finally:
        shutil.rmtree(data_dir)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each size."""
    parser = arguments("large_dataset", __doc__.splitlines()[0])
    parser.add_argument(
        "--sizes",
        type=names,
        default="50000x20,10000000x1",
        help="CLIPSxCAPTIONS of each, separated by commas (%(default)s)",
    )
    parser.add_argument("--dir", type=Path, help="where the datasets are written (temporary files)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    if options.open:
        print(json.dumps(measure(options.open)))
        return
    rows = [measure_size(size, options.dir) for size in options.sizes]
    report(rows, options, batch=BATCH, words=WORDS, held_out=HOLDOUT)


if __name__ == "__main__":
    main()
