"""Ablation of interactions and temporal heads on the test split of `shapes`.

    python -m benchmarks.ablation [--workdir=runs/ablation] [--seeds=6] [--record=FILE]

Fine-tunes `configs/shapes.py` with each of {dp, ti, wti, wti + CDCR} x {none, seqTransf} and each
seed, tests its initial CLIP without training (zero-shot), and prints the mean of the test metrics
with its 95 % confidence interval as a Markdown table. Other flags (`--config.GROUP.FIELD=VALUE`)
are passed to the trainings. Finished runs are kept: rerun the command to continue.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drl_jax.models.drl import config_from_dict
from drl_jax.runs.workdir import claim_workdir
from drl_jax.runtime.cli import (
    Parser,
    add_config_flag,
    parse_with_config,
    positive_int,
    run_command,
)
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_json

# Values of `config.model.interaction` and `config.loss.cdcr`.
INTERACTIONS = {"dp": ("dp", 0), "ti": ("ti", 0), "wti": ("wti", 0), "wti + CDCR": ("wti", 3)}
HEADS = ("none", "seqTransf")


def train(workdir: Path, name: str, flags: list[str]) -> dict[str, Any]:
    """Trains one model, unless it is already trained, and returns its `result.json`.

    Args:
      workdir: parent directory of the runs.
      name: of the run.
      flags: of the training.

    Raises:
      UserError: the training failed, or the run that is there has another configuration.
    """
    directory = workdir / name
    result = directory / "result.json"
    flags = ["--config=configs/shapes.py", *flags]
    if result.exists():
        parser = Parser("benchmarks.ablation")
        add_config_flag(parser)
        config = parse_with_config(parser, flags)[1]
        claim_workdir(directory, config_from_dict(config.to_dict()))
    else:
        # In its own process, which frees all memory when it ends.
        command = [sys.executable, "-m", "drl_jax.train", f"--workdir={directory}", *flags]
        if status := subprocess.run(command).returncode:
            raise UserError(
                f"training {directory} ended with exit status {status}; fix the error above, then"
                " rerun the command to continue"
            )
    return json.loads(result.read_text(encoding="utf-8"))


def model_flags(interaction: str, agg_module: str, seed: int) -> list[str]:
    """The flags of a row of the table, with a seed."""
    name, cdcr = INTERACTIONS[interaction]
    return [
        f"--config.model.interaction={name}",
        f"--config.model.agg_module={agg_module}",
        f"--config.loss.cdcr={cdcr}",
        f"--config.seed={seed}",
    ]


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean of several values (Student's t)."""
    from scipy.stats import t

    return t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def format_mean(values: Sequence[float]) -> str:
    """Formats the mean and, for several values, half its 95 % confidence interval."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {half_interval(values):.1f}" if len(values) > 1 else mean


def format_row(name: str, agg_module: str, results: Sequence[dict[str, Any]]) -> str:
    """A row of the table from the test metrics of its seeds."""
    recalls = [result["t2v"]["R@1"] for result in results]
    columns = (
        format_mean(recalls),
        f"{min(recalls):.1f}",
        format_mean([result["t2v"]["R@5"] for result in results]),
        format_mean([result["v2t"]["R@1"] for result in results]),
        format_mean([result["pair_accuracy"] for result in results]),
    )
    return f"| {' | '.join((name, agg_module, *columns))} |"


def run_ablation(options: argparse.Namespace, flags: list[str]) -> None:
    """Trains all models, writes the record and prints the table."""
    zero_shot = [*model_flags("dp", "none", 0), "--config.train.epochs=0"]
    found = {("zero-shot", "none"): [train(options.workdir, "zero_shot", [*flags, *zero_shot])]}
    # Seeds last, so that each row has some when the program is interrupted.
    for seed, agg_module, interaction in itertools.product(
        range(options.seeds), HEADS, INTERACTIONS
    ):
        name, cdcr = INTERACTIONS[interaction]
        run = f"{name}_cdcr{cdcr}_{agg_module}_seed{seed}"
        result = train(options.workdir, run, [*flags, *model_flags(interaction, agg_module, seed)])
        found.setdefault((interaction, agg_module), []).append(result)
    if options.record:
        from benchmarks.measure import make_record

        rows = [
            {"interaction": interaction, "agg_module": agg_module, "seed": seed, **result["test"]}
            for (interaction, agg_module), results in found.items()
            for seed, result in enumerate(results)
        ]
        write_json(options.record, make_record("ablation", rows, flags=flags))
    print("| interaction | temporal head | t2v R@1 | worst | t2v R@5 | v2t R@1 | pair accuracy |")
    print("|---|---|---|---|---|---|---|")
    for (interaction, agg_module), results in found.items():
        print(format_row(interaction, agg_module, [result["test"] for result in results]))


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
        "--seeds", type=positive_int, default=6, help="seeds per model (%(default)s)"
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
