"""Ablation of interactions and temporal heads on the test split of `shapes`.

    python -m benchmarks.ablation [--workdir=runs/ablation] [--seeds=3] [--record=FILE]

Trains `configs/shapes.py` with each of {dp, ti, wti, wti + CDCR} x {none, seqTransf} and each seed,
and prints the mean and standard deviation of the test metrics as a Markdown table. Other flags
(`--config.GROUP.FIELD=VALUE`) are passed to the trainings. Finished runs are kept: rerun the
command to continue.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from drl_jax.runtime.cli import Parser, positive_int, run_command
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_json

# Values of `config.model.interaction` and `config.loss.cdcr`.
INTERACTIONS = {"dp": ("dp", 0), "ti": ("ti", 0), "wti": ("wti", 0), "wti + CDCR": ("wti", 3)}
HEADS = ("none", "seqTransf")


def train(workdir: Path, interaction: str, agg_module: str, seed: int, flags: list[str]) -> dict:
    """Trains one model, unless it is already trained, and returns its `result.json`.

    Raises:
      UserError: the training failed.
    """
    name, cdcr = INTERACTIONS[interaction]
    directory = workdir / f"{name}_cdcr{cdcr}_{agg_module}_seed{seed}"
    result = directory / "result.json"
    if not result.exists():
        # In its own process, which frees all memory when it ends.
        command = [
            *(sys.executable, "-m", "drl_jax.train", "--config=configs/shapes.py"),
            f"--workdir={directory}",
            f"--config.model.interaction={name}",
            f"--config.model.agg_module={agg_module}",
            f"--config.loss.cdcr={cdcr}",
            f"--config.seed={seed}",
            *flags,
        ]
        if status := subprocess.run(command).returncode:
            raise UserError(
                f"training {directory} ended with exit status {status}; fix the error above, then"
                " rerun the command to continue"
            )
    return json.loads(result.read_text(encoding="utf-8"))


def format_spread(values: list[float]) -> str:
    """Formats the mean and, for several values, the sample standard deviation."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def run_ablation(options: argparse.Namespace, flags: list[str]) -> None:
    """Trains all models, writes the record and prints the table."""
    lines, rows = [], []
    for agg_module in HEADS:
        for interaction in INTERACTIONS:
            results = [
                train(options.workdir, interaction, agg_module, seed, flags)["test"]
                for seed in range(options.seeds)
            ]
            rows += [
                {"interaction": interaction, "agg_module": agg_module, "seed": seed, **result}
                for seed, result in enumerate(results)
            ]
            columns = (
                [result["t2v"]["R@1"] for result in results],
                [result["t2v"]["R@5"] for result in results],
                [result["v2t"]["R@1"] for result in results],
                [result["pair_accuracy"] for result in results],
            )
            cells = (interaction, agg_module, *map(format_spread, columns))
            lines.append(f"| {' | '.join(cells)} |")
    if options.record:
        from benchmarks.measure import make_record

        write_json(options.record, make_record("ablation", rows))
    print("| interaction | temporal head | t2v R@1 | t2v R@5 | v2t R@1 | pair accuracy |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser("python -m benchmarks.ablation", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workdir",
        type=Path,
        default=Path("runs/ablation"),
        metavar="DIR",
        help="parent directory of the runs (%(default)s)",
    )
    parser.add_argument(
        "--seeds", type=positive_int, default=3, help="seeds per model (%(default)s)"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the test metrics of all runs as JSON"
    )
    options, flags = parser.parse_known_args(arguments)
    return run_command(
        "benchmarks.ablation",
        lambda: run_ablation(options, flags),
        on_interrupt="finished runs are kept; rerun the command to continue",
    )


if __name__ == "__main__":
    sys.exit(main())
