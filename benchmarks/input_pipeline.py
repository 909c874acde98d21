"""Time per read of each source of frames, and whether training steps wait for their batches.

    python -m benchmarks.input_pipeline [--videos=DIR] [--batch=4] [--steps=6] [--record]
    python -m benchmarks.input_pipeline --reading_only --name=reading

Builds a dataset of H.264 files (those in DIR, or synthetic ones: 15 s, 320 x 240, 30 frames/s) as
`raw` and as `jpeg`, and trains ViT-B/32 on it from each source of frames:

- `mp4`: decodes the file for each example and normalises on the host, as the reference does;
- `mp4_all`: the same, and every packet is decoded, as FFmpeg would;
- `jpeg`, `raw`: reads the built dataset; `jpeg_tfds`, `raw_tfds` through TFDS;
- `memory`: caches decoded frames in host memory;
- `device`: caches decoded frames on the devices, which gather batches.

`cpu_ms` is the processor time to read one example in one thread. `pairs_per_second` is what the
reader threads deliver in batches while nothing else runs, `pairs_per_core` the same per second of
processor time: a host with N idle cores feeds at most N times as many. `step_alone` repeats the
step on one batch that is on the devices; `step_fed` takes batches as training does; both after a
warm-up. `waits` counts the steps whose batch was not ready when the previous step ended.
"""

import argparse
import contextlib
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np
import tensorflow_datasets as tfds

from benchmarks.measure import arguments, positive_int, report
from data_prep.annotations import Annotations, Captioned
from data_prep.command import DECODE_TIMEOUT
from data_prep.dataset_build import build_dataset
from data_prep.video_folder import Plan, VideoFolder, make_plan
from drl_jax.config import BackboneConfig, DataConfig, LossConfig, ModelConfig, OptimConfig
from drl_jax.data.batches import PREFETCHED_BATCHES, TrainBatches
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.frames import DiskFrames
from drl_jax.data.records import VIDEOS_SPLIT, VideoDataset
from drl_jax.data.splits import Captions, Split
from drl_jax.data.storage import StorageSpec
from drl_jax.data.video import read_frames, sampled_frames
from drl_jax.data.video_file import VideoError, open_video
from drl_jax.models.tokenizers import CLIPTokenizer
from drl_jax.runtime.resources import available_cpus
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import TrainState, create_state, make_train_step

FRAMES, WORDS = 12, 32
_FORM = FrameForm.of(BackboneConfig())
_CAPTIONS = [f"caption {number} of a clip" for number in range(8)]
# CLIP's mean and standard deviation of RGB values in [0, 1].
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class Mp4Dataset:
    """Has `read_frames` like `VideoDataset`, but decodes the video file on each call."""

    def __init__(self, paths: list[Path], every_packet: bool = False):
        self._paths, self._every_packet = paths, every_packet

    def read_frames(self, video: int) -> np.ndarray:
        with open_video(self._paths[video]) as opened:
            opened.is_certain &= not self._every_packet
            frames, _ = sampled_frames(opened, FRAMES, _FORM, None, "frames")
        _normalize_on_host(frames)
        return frames


class TFDSDataset:
    """Has `read_frames` like `VideoDataset`, through TFDS."""

    def __init__(self, dataset: VideoDataset):
        builder = tfds.builder_from_directory(dataset.directory)
        self._records = builder.as_data_source(VIDEOS_SPLIT)

    def read_frames(self, video: int) -> np.ndarray:
        return np.asarray(self._records[video]["frames"])


def _normalize_on_host(frames: np.ndarray) -> np.ndarray:
    """What the reference does on the host: ToTensor, Normalize and a zero-padded float64 array."""
    padded = np.zeros((FRAMES, 3, _FORM.size, _FORM.size))
    normalized = (frames.astype(np.float32) / 255 - _MEAN) / _STD
    padded[: len(frames)] = normalized.transpose(0, 3, 1, 2)
    return padded


def draw_videos(directory: Path, count: int) -> None:
    """Writes H.264 files of MSR-VTT's length, size and frame rate: moving waves with noise."""
    y, x = np.mgrid[0:240, 0:320].astype(np.float32)
    for number in range(count):
        rng = np.random.default_rng(number)
        waves = rng.uniform(0.01, 0.2, (3, 6, 3)).astype(np.float32)
        grain = rng.normal(0, 4, (240, 320, 3)).astype(np.float32)
        with av.open(str(directory / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for frame in range(450):
                picture = [
                    sum(np.sin(a * x + b * y + c * frame) for a, b, c in channel)
                    for channel in waves
                ]
                rgb = np.stack(picture, -1) * 20 + 128 + np.roll(grain, 7 * frame, axis=1)
                rgb = rgb.clip(0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
            container.mux(stream.encode())


def build_quietly(plan: Plan, data_dir: Path, storage: StorageSpec) -> Path:
    """Builds a dataset without progress bars; returns its directory."""
    with contextlib.redirect_stderr(io.StringIO()):
        return build_dataset("custom", plan, data_dir, storage, timeout=DECODE_TIMEOUT)


def build_datasets(
    videos: Path, data_dir: Path
) -> tuple[dict[str, VideoDataset], list[Path], float]:
    """Builds the videos of a folder; returns the datasets by encoding, the video file of each
    record, and the seconds per video of the JPEG build."""
    names = [str(path.relative_to(videos)) for path in VideoFolder(videos).files]
    splits = {"train": [Captioned(name, _CAPTIONS) for name in names]}
    plan = make_plan(Annotations(splits), videos, {})
    datasets, seconds = {}, {}
    for encoding in ("raw", "jpeg"):
        storage = StorageSpec(_FORM, FRAMES, encoding)
        start = time.perf_counter()
        datasets[encoding] = VideoDataset(build_quietly(plan, data_dir, storage))
        seconds[encoding] = (time.perf_counter() - start) / len(names)
    files = [videos / name for name in datasets["jpeg"].video_ids]
    return datasets, files, seconds["jpeg"]


def read_milliseconds(read: Callable[[int], Any], videos: int, seconds: float = 3.0) -> float:
    """Mean processor time of `read(video)` in this thread, over all videos for some seconds."""
    start = time.thread_time()
    for count in itertools.count(1):
        read(count % videos)
        taken = time.thread_time() - start
        if count >= videos and taken > seconds:
            return taken / count * 1e3


def delivery_rates(
    batches: Iterator[dict[str, np.ndarray]], batch: int, seconds: float = 5.0
) -> tuple[float, float]:
    """Pairs of batches per second, and per second of processor time, over some seconds."""
    for _ in range(PREFETCHED_BATCHES + 1):  # What the threads read before the first was taken.
        next(batches)
    start, cpu_start = time.perf_counter(), time.process_time()
    for count in itertools.count(1):
        next(batches)
        taken = time.perf_counter() - start
        if taken > seconds:
            return batch * count / taken, batch * count / (time.process_time() - cpu_start)


def time_steps(
    state: TrainState, step: Callable, batches: Iterator[dict[str, jax.Array]], steps: int
) -> tuple[TrainState, float, int]:
    """Runs steps as the training loop does, after a warm-up; returns the new state, seconds per
    step, and the number of steps that waited for their batch."""
    waits, previous, start = 0, None, 0.0
    for number in range(steps + 2):
        if number == 2:  # The first two steps are the warm-up.
            jax.block_until_ready(previous)
            start = time.perf_counter()
        batch = next(batches)
        # The previous step ended before this batch was ready.
        waits += number > 2 and previous.is_ready()
        state, scalars = step(state, batch)
        if previous is not None:
            jax.block_until_ready(previous)
        previous = scalars["loss"]
    jax.block_until_ready((state, previous))
    return state, (time.perf_counter() - start) / steps, int(waits)


def measure(options: argparse.Namespace, videos: Path, data_dir: Path) -> tuple[list[dict], dict]:
    """Builds the datasets and measures each source; returns the rows and settings of the record."""
    datasets, files, build_seconds = build_datasets(videos, data_dir)
    count = len(files)
    captions = Captions.of([_CAPTIONS] * count)
    split = Split(np.arange(count, dtype=np.int32), captions, np.zeros((0, 2), np.int32))
    sources = {
        "mp4": (Mp4Dataset(files), "none"),
        "mp4_all": (Mp4Dataset(files, every_packet=True), "none"),
        "jpeg": (datasets["jpeg"], "none"),
        "jpeg_tfds": (TFDSDataset(datasets["jpeg"]), "none"),
        "raw": (datasets["raw"], "none"),
        "raw_tfds": (TFDSDataset(datasets["raw"]), "none"),
        "memory": (datasets["raw"], "memory"),
        "device": (datasets["raw"], "device"),
    }
    if options.reading_only:
        del sources["device"]
    else:
        for name in ("mp4_all", "jpeg_tfds", "raw_tfds"):
            del sources[name]
    rows, batches, decode_ms = [], {}, 0.0
    for name, (dataset, cache) in sources.items():
        read_ms = read_milliseconds(DiskFrames(dataset, FRAMES).read, count)
        decode_ms = decode_ms or read_ms
        data = DataConfig(max_words=WORDS, cache=cache, num_threads=options.threads)
        batches[name] = TrainBatches(dataset, split, data, options.batch, 0, CLIPTokenizer())
        delivered = per_core = "-"  # The device gathers its frames itself.
        if cache != "device":
            rates = delivery_rates(batches[name].iterate(0, 0, 1), options.batch)
            delivered, per_core = map(round, rates)
        from_disk = cache == "none"
        rows.append(
            {
                "source": name,
                "cpu_ms": round(read_ms, 2) if from_disk else "-",
                "times_faster_than_mp4": round(decode_ms / read_ms, 1) if from_disk else "-",
                "pairs_per_second": delivered,
                "pairs_per_core": per_core,
            }
        )
    if not options.reading_only:
        measure_steps(rows, batches, options)
    settings = {
        **{"videos": count, "batch": options.batch, "threads": options.threads},
        "build_seconds_per_video": round(build_seconds, 3),
        "build_hours_for_10000": round(build_seconds * 10000 / 3600, 2),
        "cores": available_cpus(),
    }
    return rows, settings


def measure_steps(
    rows: list[dict], batches: dict[str, TrainBatches], options: argparse.Namespace
) -> None:
    """Adds the columns of training steps to the rows of the sources."""
    layout, config = make_layout(), ModelConfig()
    tx = make_optimizer(OptimConfig(), total_steps=1000)
    state = create_state(config, tx, seed=0, layout=layout)
    step = make_train_step(config, LossConfig(), tx, layout)
    for row in rows:
        stream = batches[row["source"]].on_devices(0, layout)
        state, alone, _ = time_steps(state, step, itertools.repeat(next(stream)), options.steps)
        state, fed, waits = time_steps(state, step, stream, options.steps)
        row |= {
            "step_alone_seconds": round(alone, 3),
            "step_fed_seconds": round(fed, 3),
            "fed_to_alone": round(fed / alone, 3),
            "waits": f"{waits} of {options.steps - 1}",
        }


def put_videos(directory: Path, options: argparse.Namespace) -> None:
    """Creates a directory with links to the readable files of `--videos`, or with drawn ones."""
    directory.mkdir()
    if options.videos is None:
        draw_videos(directory, options.count)
        return
    for path in VideoFolder(options.videos).files:
        with contextlib.suppress(VideoError):
            read_frames(path, 1, _FORM)
            (directory / path.name).symlink_to(path.absolute())


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all sources on the videos of a folder, or on synthetic ones."""
    parser = arguments(
        *("input_pipeline", __doc__),
        ("count", positive_int, 16, "number of synthetic videos"),
        ("batch", positive_int, 4, "pairs of the global batch"),
        ("steps", positive_int, 6, "timed steps, after a warm-up"),
        ("threads", positive_int, available_cpus(), "reader threads"),
    )
    parser.add_argument("--videos", type=Path, metavar="DIR", help="folder (default: synthetic)")
    parser.add_argument("--reading_only", action="store_true", help="without training steps")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        videos = Path(directory) / "videos"
        put_videos(videos, options)
        rows, settings = measure(options, videos, Path(directory) / "data")
    report(rows, options, files="drawn" if options.videos is None else "real", **settings)


# The guard also protects the build's worker processes, which import this module.
if __name__ == "__main__":
    main()
