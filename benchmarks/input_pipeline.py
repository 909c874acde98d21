"""Whether input keeps up with the training step: what a read takes, and which steps wait.

    python -m benchmarks.input_pipeline [--videos=DIR] [--batch=4] [--steps=6] [--record]

Builds a dataset of real H.264 files (of DIR, or drawn: 15 s of 320 x 240 at 30 frames a second) as
`raw` and as `jpeg`, and trains ViT-B/32 on it from each source of frames:

- `mp4`: decoded anew for each example, and normalised on the host, as the reference does;
- `jpeg`, `raw`: read from the built dataset; `memory`: kept decoded in host memory; `device`: kept
  on the devices, where batches are gathered.

`read_ms` is one example in one thread. `step_alone` repeats the step on one batch that is on the
device; `step_fed` takes batches as training does, after a warm-up. `waits` counts the steps whose
batch was not there yet when the step before it was done.
"""

import argparse
import contextlib
import io
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np

from benchmarks.measure import arguments, report
from data_prep.annotations import Annotations, Captioned
from data_prep.build import build
from data_prep.estimate import stored_bytes
from data_prep.video_folder import VideoFolder, make_plan
from drl_jax.config import ClipConfig, DataConfig, LossConfig, ModelConfig, OptimConfig
from drl_jax.data.batches import TrainBatches
from drl_jax.data.frames import DiskFrames
from drl_jax.data.records import Split, VideoDataset
from drl_jax.data.video import VideoError, read_frames
from drl_jax.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.state import create_state
from drl_jax.training.train_step import make_train_step

FRAMES, SIZE, WORDS = 12, 224, 32
_CAPTIONS = 8
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class Mp4Files:
    """Stands in for a dataset, and decodes a file whenever it is read."""

    def __init__(self, paths: list[Path]):
        self._paths = paths

    def read_frames(self, video: int) -> np.ndarray:
        frames = read_frames(self._paths[video], FRAMES, SIZE)
        _as_the_reference(frames)
        return frames


def _as_the_reference(frames: np.ndarray) -> np.ndarray:
    """Its ToTensor, Normalize and zero-padded float64 array."""
    clip = np.zeros((FRAMES, 3, SIZE, SIZE))
    normalised = (frames.astype(np.float32) / 255 - _MEAN) / _STD
    clip[: len(frames)] = normalised.transpose(0, 3, 1, 2)
    return clip


def draw_videos(directory: Path, count: int) -> None:
    """H.264 files as MSR-VTT has them in length, size and rate: drifting texture and some grain."""
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


def build_forms(videos: Path, data_dir: Path) -> tuple[dict[str, VideoDataset], list[Path], float]:
    """The built datasets by storage, their files, and seconds a video of the JPEG build."""
    names = [str(path.relative_to(videos)) for path in VideoFolder(videos).files]
    captions = [f"caption {number} of a clip" for number in range(_CAPTIONS)]
    splits = {"train": [Captioned(name, captions) for name in names]}
    plan = make_plan(Annotations(splits), videos, {})
    datasets, seconds = {}, 0.0
    for storage in ("raw", "jpeg"):
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            directory = build("custom", plan, data_dir, (SIZE, FRAMES, storage))
        datasets[storage] = VideoDataset(directory)
        seconds = (time.perf_counter() - start) / len(names)
    files = [videos / name for name in datasets["jpeg"].video_ids]
    return datasets, files, seconds


def milliseconds(read: Callable[[int], Any], videos: int, seconds: float = 3.0) -> float:
    """Of a read, in one thread, over all videos again and again."""
    start = time.perf_counter()
    for count in itertools.count(1):
        read(count % videos)
        taken = time.perf_counter() - start
        if count >= videos and taken > seconds:
            return taken / count * 1e3


def make_step(config: ModelConfig) -> tuple[Any, Callable]:
    layout = make_layout()
    tx = make_optimizer(OptimConfig(), total_steps=1000)
    state = create_state(config, tx, seed=0, layout=layout)
    return state, make_train_step(config, LossConfig(), tx, layout)


def time_steps(state: Any, step: Callable, batches: Any, steps: int) -> tuple[Any, float, int]:
    """The state, seconds a step, and how many steps waited; as the training loop does it."""
    waits, previous, start = 0, None, 0.0
    for number in range(steps + 2):
        if number == 2:  # two to warm up
            jax.block_until_ready(previous)
            start = time.perf_counter()
        batch = next(batches)
        # The step before this one is done, and this one's batch has only come now.
        waits += number > 2 and previous.is_ready()
        state, scalars = step(state, batch)
        if previous is not None:
            jax.block_until_ready(previous)
        previous = scalars["loss"]
    jax.block_until_ready((state, previous))
    return state, (time.perf_counter() - start) / steps, int(waits)


def measure(options: argparse.Namespace, videos: Path, work: Path) -> tuple[list[dict], dict]:
    datasets, files, build_seconds = build_forms(videos, work)
    count = len(files)
    captions = [[f"caption {number} of a clip" for number in range(_CAPTIONS)]] * count
    split = Split(np.arange(count, dtype=np.int32), captions, np.zeros((0, 2), np.int32))
    layout = make_layout()
    model = ModelConfig(clip=ClipConfig(), dtype=options.dtype)
    state, step = make_step(model)
    sources = {
        "mp4": (Mp4Files(files), "none"),
        "jpeg": (datasets["jpeg"], "none"),
        "raw": (datasets["raw"], "none"),
        "memory": (datasets["raw"], "memory"),
        "device": (datasets["raw"], "device"),
    }
    rows, decode_ms = [], 0.0
    for name, (dataset, cache) in sources.items():
        read_ms = milliseconds(DiskFrames(dataset, FRAMES).read, count)
        decode_ms = decode_ms or read_ms
        data = DataConfig(max_words=WORDS, cache=cache, num_threads=options.threads)
        batches = TrainBatches(dataset, split, data, options.batch, seed=0)
        stream = batches.on_devices(0, layout)
        state, alone, _ = time_steps(state, step, itertools.repeat(next(stream)), options.steps)
        state, fed, waits = time_steps(state, step, stream, options.steps)
        from_disk = cache == "none"
        rows.append(
            {
                "source": name,
                "read_ms": round(read_ms, 2) if from_disk else "-",
                "times_faster_than_mp4": round(decode_ms / read_ms, 1) if from_disk else "-",
                "step_alone_seconds": round(alone, 3),
                "step_fed_seconds": round(fed, 3),
                "fed_to_alone": round(fed / alone, 3),
                "waits": f"{waits} of {options.steps - 1}",
            }
        )
    settings = {
        "videos": count,
        "batch": options.batch,
        "threads": options.threads,
        "dtype": options.dtype,
        "build_seconds_per_video": round(build_seconds, 3),
        "build_hours_for_10000": round(build_seconds * 10000 / 3600, 2),
        "jpeg_gb_for_10000": round(stored_bytes(10000 * FRAMES, (SIZE, FRAMES, "jpeg")) / 1e9, 1),
        "cores": os.cpu_count(),
    }
    return rows, settings


def readable(videos: Path, into: Path) -> None:
    """Links to the files of a folder that can be decoded."""
    for path in VideoFolder(videos).files:
        with contextlib.suppress(VideoError):
            read_frames(path, 1, SIZE)
            (into / path.name).symlink_to(path.absolute())


def main() -> None:
    parser = arguments("input_pipeline", __doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, help="folder of video files; drawn if not given")
    parser.add_argument("--count", type=int, default=16, help="how many are drawn")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after a warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        videos = Path(directory) / "videos"
        videos.mkdir()
        if options.videos:
            readable(options.videos, videos)
        else:
            draw_videos(videos, options.count)
        rows, settings = measure(options, videos, Path(directory) / "data")
    report(rows, options, files="drawn" if options.videos is None else "real", **settings)


# Build workers start by importing this module.
if __name__ == "__main__":
    main()
