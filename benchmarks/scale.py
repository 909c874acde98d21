"""What a corpus costs, from video files to a searchable index: measured per clip, then multiplied.

    python -m benchmarks.scale [--videos=DIR] [--clips=10000000] [--nodes=16] [--record]

Each stage runs on a few H.264 files (those in DIR, or synthetic ones: 15 s, 320 x 240, 30 frames/s)
in this process; processor seconds hardly depend on what else runs. Links to the same files make
enough clips for the stages that write, and decode nothing twice. A GPU's rate is an assumption,
not a measurement. Needs the extra `ray`. `docs/scale.md` explains the formulas.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import operator
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.input_pipeline import put_videos
from benchmarks.measure import arguments, matmul_rate, positive_int, report
from data_prep.annotations import Annotations, Captioned
from data_prep.command import DECODE_TIMEOUT
from data_prep.dataset_build import build_dataset
from data_prep.decode import encode_jpeg
from data_prep.locations import Clip
from data_prep.video_folder import Plan, VideoFolder
from drl_jax.config import BackboneConfig, LossConfig, ModelConfig
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.frames import DiskFrames
from drl_jax.data.records import VideoDataset
from drl_jax.data.storage import StorageSpec
from drl_jax.data.video import read_frames
from drl_jax.search.reading import VideoRead, read_video
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.writer import IndexWriter
from drl_jax.training.flops import train_step_flops

FRAMES, WORDS = 12, 32
# Links to each file, for the stages that write: the difference of the two is measured.
_LINKS = (8, 40)
# Calls on a cluster.
_CALLS = 4000
# Videos that an index stores in one transaction (`config.eval.batch_size`).
_STORED = 128


@dataclasses.dataclass(frozen=True)
class PerClip:
    """What one clip takes.

    Attributes:
      decode: processor seconds to decode and encode its frames.
      call: processor seconds of the driver of a Ray cluster for a call on it.
      record: seconds of the one process that writes records, from the cache of frames.
      dataset_bytes: of the built dataset.
      cache_bytes: of the cache of decoded frames.
      read: processor seconds to read its frames for a training step.
      index_read: processor seconds to hash and decode it, and to make its thumbnails, for an index.
      index_put: seconds of the one process that writes an index.
      array_bytes: of the features in the index.
      database_bytes: of its row and thumbnails in the index.
      step_flops: of a training step, for each pair.
    """

    decode: float
    call: float
    record: float
    dataset_bytes: float
    cache_bytes: float
    read: float
    index_read: float
    index_put: float
    array_bytes: float
    database_bytes: float
    step_flops: float


def measure(videos: Path, directory: Path, model: ModelConfig) -> PerClip:
    """Measures all stages on the files of a folder; writes below `directory`."""
    files = VideoFolder(videos).files
    form = FrameForm.of(model.backbone)
    storage = StorageSpec(form, FRAMES, "jpeg")

    def decode(path: Path) -> None:
        for frame in read_frames(path, FRAMES, form):
            encode_jpeg(frame)

    decode_seconds = processor_seconds(decode, files)
    record, dataset_bytes, cache_bytes, dataset = measure_build(videos, directory, storage)
    read = DiskFrames(dataset, FRAMES).read
    read_seconds = processor_seconds(read, range(len(dataset)))
    reads: list[VideoRead] = []

    def read_for_index(path: Path) -> None:
        spool = directory / f"{path.name}.frames"
        reads.append(read_video(path, frozenset(), FRAMES, form, spool))
        spool.unlink(missing_ok=True)

    index_read = processor_seconds(read_for_index, files)
    put, array_bytes, database_bytes = measure_put(
        reads, directory / "index", model.backbone.embed_dim
    )
    return PerClip(
        decode=decode_seconds,
        call=measure_calls(directory / "calls", files[0]),
        record=record,
        dataset_bytes=dataset_bytes,
        cache_bytes=cache_bytes,
        read=read_seconds,
        index_read=index_read,
        index_put=put,
        array_bytes=array_bytes,
        database_bytes=database_bytes,
        step_flops=train_step_flops(model, LossConfig(), 128, FRAMES, WORDS) / 128,
    )


def processor_seconds(function: Callable, inputs: Sequence) -> float:
    """Mean processor seconds of `function(input)` in this process."""
    function(inputs[0])  # Imports and opens what the first call needs.
    start = time.process_time()
    for value in inputs:
        function(value)
    return (time.process_time() - start) / len(inputs)


def measure_calls(directory: Path, example: Path) -> float:
    """Processor seconds of this process for a call that does nothing, on a cluster of one node."""
    from drl_jax.runtime.cluster import connect

    with connect("local") as cluster:
        cluster.check({"--data_dir": directory}, example, packages=["numpy"], modules=["drl_jax"])
        list(cluster.map(operator.neg, [(number,) for number in range(100)]))
        start = time.process_time()
        list(cluster.map(operator.neg, [(number,) for number in range(_CALLS)], timeout=60))
        return (time.process_time() - start) / _CALLS


def measure_build(
    videos: Path, directory: Path, storage: StorageSpec
) -> tuple[float, float, float, VideoDataset]:
    """Builds few and many clips from a cache that has their frames.

    Returns:
      Processor seconds of the process that writes, bytes of the dataset, and bytes of the cache,
      each for one clip; and the larger dataset.
    """
    seconds, sizes, clips, target = [], [], [], Path()
    for links in _LINKS:
        folder = directory / f"links_{links}"
        names = link_repeatedly(videos, folder, links)
        captions = [Captioned(name, [f"caption of {name}"]) for name in names]
        # Not `make_plan`: links to one file would be one video.
        planned = [Clip(name, folder / name, None) for name in names]
        plan = Plan(Annotations({"train": captions}), folder, planned, {}, [])
        for _ in range(2):  # The first build decodes.
            start = time.process_time()
            with contextlib.redirect_stderr(io.StringIO()):  # Hides the progress bars.
                target = build_dataset(
                    *("custom", plan, directory / "data", storage), timeout=DECODE_TIMEOUT
                )
            taken = time.process_time() - start
        seconds.append(taken)
        sizes.append(bytes_below(target))
        clips.append(len(names))
    more = clips[1] - clips[0]
    cache = bytes_below(directory / "data" / "cache") / len(VideoFolder(videos).files)
    return (
        (seconds[1] - seconds[0]) / more,
        (sizes[1] - sizes[0]) / more,
        cache,
        VideoDataset(target),
    )


def link_repeatedly(videos: Path, folder: Path, links: int) -> list[str]:
    """Creates links to each file of a folder, which share its entry in the cache of frames."""
    folder.mkdir()
    names = []
    for path, number in itertools.product(VideoFolder(videos).files, range(links)):
        names.append(f"{path.stem}_{number}{path.suffix}")
        (folder / names[-1]).symlink_to(path.resolve())
    return names


def measure_put(
    reads: Sequence[VideoRead], directory: Path, width: int
) -> tuple[float, float, float]:
    """Stores videos of one window in a new index, with random features.

    Returns:
      Seconds, bytes of features, and bytes of the database, each for one video.
    """
    rng = np.random.default_rng(0)
    short = [read for read in reads if read.strips]
    count = 8 * _STORED
    with IndexWriter(directory) as writer:
        writer.update_header(source={}, fingerprint="", videos="", storage="bfloat16")
        start = 0.0
        # The first transaction creates the files.
        for batch in range(count // _STORED + 1):
            videos, strips = [], {}
            for number in range(_STORED):
                read, path = short[number % len(short)], f"videos/{batch:05}/{number:05}.mp4"
                videos.append(
                    IndexedVideo(
                        path,
                        size=10**6,
                        mtime_ns=10**18,
                        sha256=read.sha256,
                        times=read.times[:FRAMES],
                        windows=read.windows[:1],
                        duration=read.duration,
                    )
                )
                strips[path] = list(read.strips)
            features = {
                "frame_unit": rng.normal(size=(_STORED, FRAMES, width)).astype(np.float32),
                "frame_mask": np.ones((_STORED, FRAMES), bool),
                "frame_weight": np.full((_STORED, FRAMES), 1 / FRAMES, np.float32),
            }
            if batch == 1:
                start, first = time.perf_counter(), sizes_of_index(directory)
            writer.put(videos, features, strips)
        seconds = time.perf_counter() - start
        last = sizes_of_index(directory)
    arrays, database = (after - before for before, after in zip(first, last, strict=True))
    return seconds / count, arrays / count, database / count


def sizes_of_index(directory: Path) -> tuple[int, int]:
    """Bytes of the arrays and of everything else."""
    arrays = sum(path.stat().st_size for path in directory.glob("*.bin"))
    return arrays, bytes_below(directory) - arrays


def bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def costs(one: PerClip, options: argparse.Namespace) -> list[dict]:
    """What all clips cost: rows of stage, what one clip takes, and totals."""
    clips, cores = options.clips, options.nodes * options.cores
    gpus, rate = options.nodes * options.gpus, options.gpu_tflops * 1e12
    # A third of a step is the forward pass; that of the text is a few percent of it.
    encode = one.step_flops / 3

    def row(stage: str, taken: str, unit: str, total: float, hours: float | str) -> dict:
        hours = hours if isinstance(hours, str) else f"{hours:.3g}"
        return {
            "stage": stage,
            "a clip": taken,
            "all clips": f"{total:,.3g} {unit}",
            "hours on all nodes": hours,
        }

    def on_cores(stage: str, seconds: float) -> dict:
        total = clips * seconds / 3600
        return row(stage, f"{seconds:.4f} core-s", "core-hours", total, total / cores)

    def in_one_process(stage: str, seconds: float) -> dict:
        total = clips * seconds / 3600
        return row(stage, f"{seconds * 1e3:.2f} ms", "hours", total, total)

    def on_gpus(stage: str, flops: float) -> dict:
        total = clips * flops / rate / 3600
        return row(stage, f"{flops / 1e9:.0f} GFLOP", "GPU-hours", total, total / gpus)

    def stored(stage: str, size: float) -> dict:
        return row(stage, f"{size / 1e3:.1f} kB", "TB", clips * size / 1e12, "-")

    return [
        on_cores("build: decode", one.decode),
        in_one_process("build: the driver of a cluster, calls and records", one.call + one.record),
        stored("build: dataset", one.dataset_bytes),
        stored("build: cache of frames", one.cache_bytes),
        on_cores("train: read frames, an epoch", one.read),
        on_gpus("train: steps, an epoch", one.step_flops),
        on_cores("index: read videos", one.index_read),
        on_gpus("index: encode", encode),
        in_one_process("index: the driver of a cluster, calls and rows", one.call + one.index_put),
        stored("index: features", one.array_bytes),
        stored("index: rows and thumbnails", one.database_bytes),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all stages and prints what a corpus costs."""
    parser = arguments("scale", __doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, metavar="DIR", help="folder (default: synthetic)")
    parser.add_argument(
        "--count", type=positive_int, default=12, help="number of synthetic videos (%(default)s)"
    )
    for name, default, text in (
        ("clips", 10_000_000, "of the corpus"),
        ("nodes", 16, "machines"),
        ("cores", 64, "processors of a node"),
        ("gpus", 8, "GPUs of a node"),
        ("gpu_tflops", 400, "assumed rate of a GPU, TFLOP/s"),
    ):
        parser.add_argument(
            f"--{name}", type=positive_int, default=default, help=f"{text} (%(default)s)"
        )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        videos = Path(directory) / "videos"
        put_videos(videos, options)
        one = measure(videos, Path(directory), ModelConfig(backbone=BackboneConfig()))
    report(
        costs(one, options),
        options,
        files="drawn" if options.videos is None else "real",
        matmul_gflops=round(matmul_rate() / 1e9),
        a_clip=dataclasses.asdict(one),
        **{name: getattr(options, name) for name in ("clips", "nodes", "cores", "gpus")},
        assumed_gpu_tflops=options.gpu_tflops,
    )


# The guard also protects the build's worker processes, which import this module.
if __name__ == "__main__":
    main()
