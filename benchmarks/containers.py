"""Custom datasets from files, tar files and Parquet files: planning and building.

    python -m benchmarks.containers [--videos=DIR] [--rows=200000] [--record]

Planning reads captions and finds the places of the videos, in a process of its own: rows a second,
and bytes of memory a row that it holds at the end and held at most. Its videos are 3 kB of zeros,
which it does not read. Building decodes the videos in DIR, or synthetic ones, from each form with
an empty cache: the least of `--repeats`. Seconds are those of the processors, so that other work
of the machine counts less.
"""

import contextlib
import io
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from benchmarks.input_pipeline import draw_videos
from benchmarks.measure import arguments, positive_int, report
from data_prep.command import DECODE_TIMEOUT
from data_prep.dataset_build import build_dataset
from data_prep.datasets import builder_class
from data_prep.video_folder import VideoFolder, make_plan
from drl_jax.runtime.resources import available_cpus
from drl_jax.runtime.worker_pool import map_in_processes

_WORDS = "a man rides the red bicycle along an empty road near"
_PER_FILE = 10_000
# Name of a video, its content, and its caption.
Sample = tuple[str, bytes, str]


def write_shards(directory: Path, samples: Iterable[Sample]) -> None:
    """Writes tar files of 10,000 videos, each followed by its caption."""
    for number, group in enumerate(_groups(samples)):
        with tarfile.open(directory / f"{number:05d}.tar", "w") as tar:
            for name, video, caption in group:
                for suffix, content in (("mp4", video), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_tables(directory: Path, samples: Iterable[Sample]) -> None:
    """Writes Parquet files of 10,000 videos, in row groups of 10."""
    for number, group in enumerate(_groups(samples)):
        ids, videos, captions = zip(*group, strict=True)
        table = pa.table({"id": ids, "bytes": videos, "caption": captions})
        parquet.write_table(table, directory / f"{number:05d}.parquet", row_group_size=10)


def write_paths(directory: Path, samples: Iterable[Sample]) -> None:
    """Writes one Parquet file of paths and captions."""
    names, _, captions = zip(*samples, strict=True)
    table = pa.table({"video": [f"{name}.mp4" for name in names], "caption": captions})
    parquet.write_table(table, directory / "paths.parquet")


def _groups(samples: Iterable[Sample]) -> Iterable[list[Sample]]:
    samples = list(samples)
    return (samples[n : n + _PER_FILE] for n in range(0, len(samples), _PER_FILE))


FORMS: dict[str, Callable[[Path, Iterable[Sample]], None]] = {
    "paths in Parquet": write_paths,
    "tar": write_shards,
    "Parquet": write_tables,
}


def plan(annotations: Path) -> tuple[float, int, int]:
    """Plans a dataset in a fresh process.

    Returns:
      Seconds of processor time, and bytes of memory that it added: at the end, and at most.
    """
    builder = builder_class("custom")
    before, start = _resident_bytes(), time.process_time()
    found = builder.read_annotations(annotations)
    planned = make_plan(found, None, {}) if found.contained else found
    seconds = time.process_time() - start
    held, peak = _resident_bytes(), _resident_bytes("VmHWM")
    del planned
    return seconds, held - before, peak - before


def _resident_bytes(field: str = "VmRSS") -> int:
    # The peak of getrusage is also that of the parent before this process was its own.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_plans(directory: Path, count: int) -> dict[str, dict[str, int]]:
    """Plans `count` videos of each form."""
    rows = {}
    for name, write in FORMS.items():
        target = directory / "plan" / name.replace(" ", "_")
        target.mkdir(parents=True)
        write(target, ((f"{n:09d}", bytes(3000), f"{_WORDS} {n}") for n in range(count)))
        (result,) = map_in_processes(plan, [(target,)])
        seconds, held, peak = result
        rows[name] = {
            "planned_per_second": round(count / seconds),
            "bytes_per_row": round(held / count),
            "peak_bytes_per_row": round(peak / count),
        }
    return rows


def measure_builds(directory: Path, videos: Path, repeats: int) -> tuple[dict[str, float], int]:
    """Least processor seconds of a build of the videos from each form, and their number."""
    files = VideoFolder(videos).files
    samples = [(path.stem, path.read_bytes(), f"{_WORDS} {path.stem}") for path in files]
    plans, builder = {}, builder_class("custom")
    for name, write in FORMS.items():
        target = directory / "build" / name.replace(" ", "_")
        target.mkdir(parents=True)
        write(target, samples)
        plans[name] = make_plan(builder.read_annotations(target), videos, {})
    seconds = {name: [] for name in plans}
    for repeat in range(repeats):
        for name, planned in plans.items():
            start = _processor_seconds()
            with contextlib.redirect_stderr(io.StringIO()):  # Hides the progress bars.
                build_dataset(
                    "custom",
                    planned,
                    directory / f"{repeat}_{name}",
                    builder.DEFAULT_STORAGE,
                    timeout=DECODE_TIMEOUT,
                )
            seconds[name].append(_processor_seconds() - start)
    return {name: round(min(taken), 2) for name, taken in seconds.items()}, len(files)


def _processor_seconds() -> float:
    """Of this process, and of its children that ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures planning and building of each form."""
    parser = arguments("containers", __doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, metavar="DIR", help="folder of video files")
    parser.add_argument("--rows", type=positive_int, default=200_000, help="planned (%(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="builds (%(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        videos = options.videos or directory / "videos"
        if options.videos is None:
            videos.mkdir()
            draw_videos(videos, 8)
        builds, count = measure_builds(directory, videos, options.repeats)
        plans = measure_plans(directory, options.rows)
        rows = [{"form": name, **plans[name], "build_seconds": builds[name]} for name in FORMS]
    report(rows, options, rows_planned=options.rows, videos_built=count, cores=available_cpus())


if __name__ == "__main__":
    main()
