"""What ways of fine-tuning give, cost and forget, on `shapes` and `shapes_events`.

    python -m benchmarks.fine_tuning [--seeds=3] [--datasets=shapes,shapes_events] [--record]

Trains runs in `--directory`, each in a process of its own; those that are complete are kept. All
start from the installed CLIP (`shapes_clip`), which was trained on `shapes_stills`. `forgotten` is
the t2v R@1 of the towers on the test of `shapes_stills` that is lost (`evaluate --alphas`), after
fine-tuning and halfway between the start and its result. Values are means over seeds, with the
lowest and the highest of them. `cpu_seconds` of the first run include building the dataset and
storing the features.
"""

import json
import resource
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.measure import arguments, names, positive_int, report
from drl_jax.data.storage import StorageSpec
from drl_jax.models.drl import param_shapes
from drl_jax.runs.interpolation import evaluate_alphas
from drl_jax.runs.workdir import load_config
from drl_jax.runtime.cli import run_command
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.worker_pool import run_module
from drl_jax.training.flops import train_step_flops
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.trainable import Trainable

_HEADS = "--config.optim.trainable=temporal,interaction,logit_scale"
# Flags of each way; {features} is a directory for the run's dataset.
WAYS = {
    "full": (),
    "heads on stored features": (_HEADS, "--features={features}"),
    "LoRA 8": ("--config.model.lora.rank=8",),
    "moving average": ("--config.optim.ema=0.99",),
    "margin": ("--config.loss.margin=0.1",),
}
_SECOND = "shapes_stills"


def run_one(dataset: str, way: str, seed: int, directory: Path) -> dict[str, Any]:
    """Trains a run unless it is complete; returns what it gives and costs."""
    workdir = directory / f"{dataset}_{way.replace(' ', '_')}_{seed}"
    row_file, data_dir = workdir / "study.json", directory / "data"
    if row_file.exists():
        return json.loads(row_file.read_text())
    flags = [flag.format(features=directory / f"features_{dataset}") for flag in WAYS[way]]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run_module(
        "drl_jax.train",
        f"--config=configs/{dataset}.py",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        f"--config.seed={seed}",
        "--config.train.pictures=False",
        *flags,
    ):
        raise UserError(f"the training in {workdir} failed; see above")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    config = load_config(workdir)
    storage = StorageSpec.of(config).flags(_SECOND)
    if run_module("data_prep.build", _SECOND, f"--data_dir={data_dir}", *storage):
        raise UserError(f"building {_SECOND} failed; see above")
    mixed = evaluate_alphas(workdir, config, [0.0, 0.5, 1.0], second=_SECOND)
    test = json.loads((workdir / "result.json").read_text())["test"]
    trainable, shapes = Trainable.of(config.optim), param_shapes(config.model)
    trained = jax.eval_shape(trainable.split, shapes)[0]
    moments = jax.eval_shape(make_optimizer(config.optim, 1000).init, shapes)
    sizes = (config.train.batch_size, config.data.max_frames, config.data.max_words)
    stored = bool(config.data.features)
    flops = train_step_flops(config.model, config.loss, *sizes, trainable, stored)
    row = {
        "trained": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "optimiser_mb": sum(leaf.size * 4 for leaf in jax.tree.leaves(moments)) / 1e6,
        "gflop_a_pair": flops / sizes[0] / 1e9,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "t2v_R@1": test["t2v"]["R@1"],
        "v2t_R@1": test["v2t"]["R@1"],
        "pair_accuracy": test["pair_accuracy"],
        "forgotten": mixed[-1]["forgetting"],
        "half_t2v_R@1": mixed[1]["t2v_R@1"],
        "half_forgotten": mixed[1]["forgetting"],
    }
    row_file.write_text(json.dumps(row))
    return row


def _summary(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and evaluates each way on each dataset with each seed."""
    parser = arguments(
        *("fine_tuning", __doc__),
        ("directory", Path, Path("runs/fine_tuning"), "of runs and data"),
        ("datasets", names, "shapes,shapes_events", "drawn datasets"),
        ("ways", names, ",".join(WAYS), "ways of fine-tuning"),
        ("seeds", positive_int, 3, "number of seeds, from 0"),
    )
    options = parser.parse_args(argv)
    options.directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for dataset in options.datasets:
        for way in options.ways:
            found = [
                run_one(dataset, way, seed, options.directory) for seed in range(options.seeds)
            ]
            same = ("trained", "optimiser_mb", "gflop_a_pair")
            row = {"dataset": dataset, "way": way, **{name: found[0][name] for name in same}}
            row |= {
                name: _summary([one[name] for one in found])
                for name in found[0]
                if name not in same
            }
            rows.append(row)
    report(rows, options, seeds=options.seeds)


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.fine_tuning", main))
