"""What a corpus costs, from video files to a searchable index: measured per clip, then multiplied.

    python -m benchmarks.scale [--videos=DIR] [--clips=10000000] [--nodes=16] [--record]

Each stage runs on a few H.264 files (those in DIR, or synthetic ones: 15 s, 320 x 240, 30 frames/s)
in this process; processor seconds hardly depend on what else runs. Links to the same files make
enough clips for the stages that write, and decode nothing twice. A GPU's rate is an assumption,
not a measurement. Needs the extra `ray`. `docs/scale.md` explains the formulas.
"""

import argparse
import dataclasses
import itertools
import operator
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.input_pipeline import build_quietly, put_videos
from benchmarks.measure import arguments, matmul_rate, positive_int, report
from data_prep.annotations import Annotations, Captioned
from data_prep.decode import encode_jpeg
from data_prep.locations import Clip
from data_prep.video_folder import Plan, VideoFolder
from drl_jax.config import BackboneConfig, LossConfig, ModelConfig
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.frames import DiskFrames
from drl_jax.data.records import VideoDataset
from drl_jax.data.storage import StorageSpec
from drl_jax.data.video import read_frames
from drl_jax.search.encoding import quantize
from drl_jax.search.index_file import IndexWriter
from drl_jax.search.reading import FrameSampling, VideoRead, read_video
from drl_jax.search.segments import VideoRecord
from drl_jax.training.flops import train_step_flops

FRAMES, WORDS = 12, 32
# Links to each file, for the stages that write: the difference of the two is measured.
_LINKS = (8, 40)
# Calls on a cluster.
_CALLS = 4000
# Videos of a commit of an index (`config.eval.batch_size`), and commits until they are merged.
_STORED, _COMMITS = 128, 16
# How often a video is written again by merges: 16 times 128, 16 of these, and all of these.
_MERGES = 3


@dataclasses.dataclass(frozen=True)
class PerClip:
    """What one clip takes: mean seconds, bytes and FLOPs."""

    decode: float  # Processor seconds to decode and encode its frames.
    call: float  # Processor seconds of the driver of a Ray cluster for a call on it.
    record: float  # Seconds of the one process that writes records, from the cache of frames.
    dataset_bytes: float
    cache_bytes: float  # Of the cache of decoded frames.
    read: float  # Processor seconds to read its frames for a training step.
    index_read: float  # Processor seconds to hash, decode and draw it for an index.
    index_put: float  # Seconds of the one process that writes an index.
    index_merge: float  # Seconds of this process to write it again when segments are merged.
    array_bytes: float  # Of its features in the index.
    row_bytes: float  # Of its row and thumbnails in the index.
    step_flops: float  # Of a training step, for each pair.


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
        reads.append(read_video(path, (), FrameSampling(form, FRAMES, 1.0), spool))
        spool.unlink(missing_ok=True)

    index_read = processor_seconds(read_for_index, files)
    stored = measure_put(reads, directory / "index", model.backbone.embed_dim)
    return PerClip(
        decode=decode_seconds,
        call=measure_calls(directory / "calls", files[0]),
        record=record,
        dataset_bytes=dataset_bytes,
        cache_bytes=cache_bytes,
        read=read_seconds,
        index_read=index_read,
        **stored,
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
    """Builds few and many clips from a cache that has their frames. Returns for one clip processor
    seconds of the process that writes, bytes of the dataset and of the cache; and the dataset."""
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
            target = build_quietly(plan, directory / "data", storage)
            taken = time.process_time() - start
        seconds.append(taken)
        sizes.append(bytes_below(target))
        clips.append(len(names))
    of_one = [(many - few) / (clips[1] - clips[0]) for few, many in (seconds, sizes)]
    cache = bytes_below(directory / "data" / "cache") / len(VideoFolder(videos).files)
    return *of_one, cache, VideoDataset(target)


def link_repeatedly(videos: Path, folder: Path, links: int) -> list[str]:
    """Creates links to each file of a folder, which share its entry in the cache of frames."""
    folder.mkdir()
    names = []
    for path, number in itertools.product(VideoFolder(videos).files, range(links)):
        names.append(f"{path.stem}_{number}{path.suffix}")
        (folder / names[-1]).symlink_to(path.resolve())
    return names


def measure_put(reads: Sequence[VideoRead], directory: Path, width: int) -> dict[str, float]:
    """Stores videos of one window in a new index, with random features: fields of `PerClip`."""
    rng, count, seconds = np.random.default_rng(0), _STORED * _COMMITS, 0.0
    reads = [read for read in reads if read.arrays]
    with IndexWriter(directory) as writer:
        writer.update_header(
            source={}, fingerprint="", videos="", storage="bfloat16", fps=1.0, bank=[]
        )
        for batch in range(_COMMITS):
            units = rng.normal(size=(_STORED, 1, FRAMES, width)).astype(np.float32)
            windows = quantize({"frame_unit": units}, "bfloat16")
            windows |= quantize({"pooled_unit": units.mean(axis=2)}, "int8")
            windows["frame_mask"] = np.ones((_STORED, 1, FRAMES), bool)
            windows["frame_weight"] = np.full((_STORED, 1, FRAMES), 1 / FRAMES, np.float32)
            windows["bank_similarity"] = np.zeros((_STORED, 1, 2), np.float32)
            records = []
            for number in range(_STORED):
                read, path = reads[number % len(reads)], f"videos/{batch:05}/{number:05}.mp4"
                arrays = {f"window.{name}": array[number] for name, array in windows.items()}
                arrays["feature.image_feat"] = np.zeros((0, width), np.uint16)
                sizes = {"window": 1, "frame": FRAMES}
                for name, array in read.arrays.items():
                    arrays[name] = array[: sizes.get(name.partition(".")[0], len(array))]
                about = (path, 10**6, 10**18, read.sha256, "", 0.0, read.duration)
                records.append(VideoRecord(*about, arrays))
            start = time.perf_counter()
            writer.put(records)
            seconds += time.perf_counter() - start
        start = time.perf_counter()
        writer.merge()
        merged = time.perf_counter() - start
    vectors = sum(path.stat().st_size for path in directory.rglob("*_unit*.bin"))
    other = bytes_below(directory) - vectors
    totals = {"index_put": seconds, "index_merge": merged, "array_bytes": vectors}
    return {name: total / count for name, total in (totals | {"row_bytes": other}).items()}


def bytes_below(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def costs(one: PerClip, options: argparse.Namespace) -> list[dict]:
    """What all clips cost: rows of stage, what one clip takes, totals, and hours."""
    rate = options.gpu_tflops * 1e12
    # What one clip takes, in a unit; the unit of all clips, its size, and how many work on them.
    cores = ("{:.4f} core-s", 1, "core-hours", 3600, options.nodes * options.cores)
    process = ("{:.2f} ms", 1e-3, "hours", 3600, 1)
    gpus = ("{:.0f} GFLOP", 1e9, "GPU-hours", 3600 * rate, options.nodes * options.gpus)
    stored = ("{:.1f} kB", 1e3, "TB", 1e12, 0)
    shards = options.nodes * options.gpus

    def row(stage: str, kind: tuple, amount: float, shards: int = 1) -> dict:
        text, unit, of_all, size, workers = kind
        total = options.clips * amount / shards / size
        return {
            "stage": stage,
            "a clip": text.format(amount / unit),
            "all clips": f"{total:,.3g} {of_all}",
            "hours on all nodes": f"{total / workers:.3g}" if workers else "-",
        }

    return [
        row("build: decode", cores, one.decode),
        row("build: the driver of a cluster, calls and records", process, one.call + one.record),
        row("build: dataset", stored, one.dataset_bytes),
        row("build: cache of frames", stored, one.cache_bytes),
        row("train: read frames, an epoch", cores, one.read),
        row("train: steps, an epoch", gpus, one.step_flops),
        row("index: read videos", cores, one.index_read),
        # A third of a step is the forward pass; that of the text is a few percent of it.
        row("index: encode", gpus, one.step_flops / 3),
        row("index: rows, of one of the shards", process, one.index_put, shards),
        row("index: merges, of one of them", process, _MERGES * one.index_merge, shards),
        row("index: features", stored, one.array_bytes),
        row("index: rows and thumbnails", stored, one.row_bytes),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all stages and prints what a corpus costs."""
    parser = arguments(
        *("scale", __doc__),
        ("count", positive_int, 12, "number of synthetic videos"),
        ("clips", positive_int, 10_000_000, "of the corpus"),
        ("nodes", positive_int, 16, "machines"),
        ("cores", positive_int, 64, "processors of a node"),
        ("gpus", positive_int, 8, "GPUs of a node"),
        ("gpu_tflops", positive_int, 400, "assumed rate of a GPU, TFLOP/s"),
    )
    parser.add_argument("--videos", type=Path, metavar="DIR", help="folder (default: synthetic)")
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
