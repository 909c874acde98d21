"""The ablation of interactions and temporal heads on the test split of `shapes`.

    python -m benchmarks.ablation [--workdir=runs/ablation] [--seeds=3]

Trains `configs/shapes.py` for each of {dp, ti, wti, wti + CDCR} x {none, seqTransf} and each seed,
prints mean and standard deviation as a Markdown table, and with `--record=FILE` writes every run's
test as JSON. What is finished is kept: interrupted, the same command goes on.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import jax

INTERACTIONS = {"dp": ("dp", 0), "ti": ("ti", 0), "wti": ("wti", 0), "wti + CDCR": ("wti", 3)}
HEADS = ("none", "seqTransf")


def run(workdir: Path, interaction: str, agg_module: str, seed: int, flags: list[str]) -> dict:
    """The `result.json` of one training, which runs unless it has finished before."""
    name, cdcr = INTERACTIONS[interaction]
    directory = workdir / f"{name}_cdcr{cdcr}_{agg_module}_seed{seed}"
    result = directory / "result.json"
    if not result.exists():
        # A process of its own: what training allocates goes with it.
        command = [
            *(sys.executable, "-m", "drl_jax.train", "--config=configs/shapes.py"),
            f"--workdir={directory}",
            f"--config.model.interaction={name}",
            f"--config.model.agg_module={agg_module}",
            f"--config.loss.cdcr={cdcr}",
            f"--config.seed={seed}",
            *flags,
        ]
        if subprocess.run(command).returncode:
            sys.exit(f"benchmarks.ablation: {directory.name} failed or was stopped; see above")
    return json.loads(result.read_text())


def spread(values: list[float]) -> str:
    """Mean and, of several, the standard deviation of the sample."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="JSON file for the test of every run")
    options, flags = parser.parse_known_args()
    rows, tests = [], []
    for agg_module in HEADS:
        for interaction in INTERACTIONS:
            results = [
                run(options.workdir, interaction, agg_module, seed, flags)["test"]
                for seed in range(options.seeds)
            ]
            tests += [
                {"interaction": interaction, "agg_module": agg_module, "seed": seed, **result}
                for seed, result in enumerate(results)
            ]
            columns = (
                [result["t2v"]["R@1"] for result in results],
                [result["t2v"]["R@5"] for result in results],
                [result["v2t"]["R@1"] for result in results],
                [result["pair_accuracy"] for result in results],
            )
            rows.append(f"| {interaction} | {agg_module} | {' | '.join(map(spread, columns))} |")
    if options.record:
        record = {
            "benchmark": "ablation",
            "device": f"{jax.default_backend()} {platform.machine()}",
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
            "runs": tests,
        }
        options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("| interaction | temporal head | t2v R@1 | t2v R@5 | v2t R@1 | pair accuracy |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
