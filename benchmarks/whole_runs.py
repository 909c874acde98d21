"""What whole runs of `drl_jax.train` spend their wall time on.

    python -m benchmarks.whole_runs [--runs=shapes,vit_b32] [--record]

- `shapes`: an epoch of `configs/shapes.py`.
- `vit_b32`: 20 steps of ViT-B/32 with random weights, on a built dataset of drawn videos.

The datasets are built first, which is not timed. The seconds are those of the run's manifest.
`percent` is of the whole run, `percent_of_epochs` of what is repeated in longer runs.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.input_pipeline import draw_videos
from benchmarks.measure import arguments, matmul_rate, names, positive_int, report

# What a run does once, however long it is.
_ONCE = ("start", "dataset", "compilation")
_DRAWN_VIDEOS = 4
_HELD_OUT = 8


def build_shapes(directory: Path, options: argparse.Namespace) -> list[str]:
    """Draws `shapes` and returns the arguments of its run."""
    del options
    _run("data_prep.build", "shapes", f"--data_dir={directory}")
    return ["--config=configs/shapes.py", "--config.train.epochs=1"]


def build_vit_b32(directory: Path, options: argparse.Namespace) -> list[str]:
    """Builds a dataset of as many videos as the steps need and returns the arguments of its run."""
    videos = directory / "videos"
    videos.mkdir()
    draw_videos(videos, _DRAWN_VIDEOS)
    drawn = sorted(videos.iterdir())
    rows = []
    for number in range(options.steps * options.batch + 2 * _HELD_OUT):
        name = f"copy_{number}.mp4"
        shutil.copy(drawn[number % len(drawn)], videos / name)
        split = {0: "val", 1: "test"}.get(number // _HELD_OUT, "train")
        rows.append({"video": name, "caption": f"video number {number}", "split": split})
    annotations = directory / "captions.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _run(
        "data_prep.build",
        "custom",
        f"--videos={videos}",
        f"--annotations={annotations}",
        f"--data_dir={directory}",
    )
    return [
        "--config=configs/custom.py",
        f"--config.train.batch_size={options.batch}",
        "--config.train.epochs=1",
    ]


RUNS = {"shapes": build_shapes, "vit_b32": build_vit_b32}


def run_names(text: str) -> list[str]:
    """Argument type: names of RUNS, separated by commas."""
    if unknown := sorted(set(names(text)) - set(RUNS)):
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(RUNS)}")
    return names(text)


def measure(name: str, options: argparse.Namespace) -> list[dict]:
    """Trains and returns the activities of the run, the longest first."""
    with tempfile.TemporaryDirectory() as directory:
        run_arguments = RUNS[name](Path(directory), options)
        workdir = Path(directory) / "run"
        data = f"--config.data.data_dir={directory}"
        _run("drl_jax.train", *run_arguments, data, f"--workdir={workdir}")
        seconds = json.loads((workdir / "manifest.json").read_text())["starts"][-1]["seconds"]
    total = sum(seconds.values())
    repeated = sum(value for activity, value in seconds.items() if activity not in _ONCE)
    return [
        {
            "run": name,
            "activity": activity,
            "seconds": value,
            "percent": round(100 * value / total, 1),
            "percent_of_epochs": "-" if activity in _ONCE else round(100 * value / repeated, 1),
        }
        for activity, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def _run(module: str, *flags: str) -> None:
    subprocess.run([sys.executable, "-m", module, *flags], check=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each run."""
    parser = arguments("whole_runs", __doc__.splitlines()[0])
    parser.add_argument(
        "--runs",
        type=run_names,
        default=",".join(RUNS),
        help="shapes and vit_b32, separated by commas (%(default)s)",
    )
    parser.add_argument(
        "--steps", type=positive_int, default=20, help="steps of vit_b32 (%(default)s)"
    )
    parser.add_argument(
        "--batch", type=positive_int, default=4, help="pairs of its global batch (%(default)s)"
    )
    options = parser.parse_args(argv)
    rows = [row for name in options.runs for row in measure(name, options)]
    rate = matmul_rate()
    report(
        rows,
        options,
        steps=options.steps,
        batch=options.batch,
        matmul_tflops_per_second=round(rate / 1e12, 3),
    )


if __name__ == "__main__":
    main()
