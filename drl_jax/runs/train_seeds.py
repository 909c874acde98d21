"""Trains one configuration with several seeds, and summarises their tests."""

import dataclasses
import gc
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drl_jax.config import Config
from drl_jax.evaluation.metrics import RANK_METRICS, flatten
from drl_jax.runs.protocol_card import ProtocolCard
from drl_jax.runs.train_run import RESULT_FILE, train
from drl_jax.runs.workdir import CONFIG_FILE, WorkdirError, changed_fields, load_config
from drl_jax.runtime.distributed import failing_together, from_main, is_main
from drl_jax.runtime.errors import UserError, raise_if_refused
from drl_jax.runtime.files import write_json

SEEDS_FILE = "seeds.json"


def train_seeds(config: Config, workdir: Path, seeds: Sequence[int]) -> None:
    """Trains a run for each seed in `WORKDIR/seed_N`; prints and writes a table, `seeds.json`.

    Seeds that are finished are not trained again, and one that was stopped goes on. `seeds.json`
    is {"runs": [{"seed": .., "workdir": .., "best_step": .., "test": .., "card": ..}, ..],
    "summary": {"mean": .., "std": .., "worst": ..}, "card": ..}.

    Raises:
      UserError: as `train`; or `workdir` is itself a run, or cannot be written.
    """
    with failing_together(WorkdirError):
        if (workdir / CONFIG_FILE).exists():
            raise WorkdirError(
                f"{workdir} holds a run, and --seeds makes a directory of runs; choose another"
                " directory"
            )
    # In this process, one after another: a process can join the others of a run only once, and
    # signals and the exit status stay those of a single training.
    for number, seed in enumerate(seeds, start=1):
        directory, own = workdir / f"seed_{seed}", dataclasses.replace(config, seed=seed)
        finished = bool(from_main(_finished_result(directory, own) is not None))
        if is_main():
            state = f"finished in {directory}" if finished else f"training in {directory}"
            print(f"seed {seed}, {number} of {len(seeds)}: {state}", flush=True)
        if not finished:
            train(own, directory)
            gc.collect()  # The arrays of this run, before the next one needs the memory.
    if is_main():
        _report(config, workdir, seeds)


def _finished_result(workdir: Path, config: Config) -> dict[str, Any] | None:
    """`result.json` of a finished run of a configuration; None if `train` has to see to it."""
    try:
        result = json.loads((workdir / RESULT_FILE).read_text(encoding="utf-8"))
        flatten(result["test"]), ProtocolCard.from_dict(result["card"]), result["best_step"]
        stored = load_config(workdir)
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise_if_refused(workdir / RESULT_FILE, error)
        return None
    if config.model.init:
        # The weights replaced it.
        model = dataclasses.replace(config.model, backbone=stored.model.backbone)
        config = dataclasses.replace(config, model=model)
    return None if changed_fields(stored, config) else result


def _report(config: Config, workdir: Path, seeds: Sequence[int]) -> None:
    runs = []
    for seed in seeds:
        directory = f"seed_{seed}"
        result = _finished_result(workdir / directory, dataclasses.replace(config, seed=seed))
        if result is None:
            raise WorkdirError(f"{workdir / directory} was changed meanwhile; rerun the command")
        kept = {name: result[name] for name in ("best_step", "test", "card")}
        runs.append({"seed": seed, "workdir": directory, **kept})
    cards = [ProtocolCard.from_dict(run["card"]) for run in runs]
    card = dataclasses.replace(cards[0], seeds=tuple(seeds), step=None, parameters_sha256="")
    tests = {run["seed"]: flatten(run["test"]) for run in runs}
    summary = summarise_seeds(list(tests.values()))
    write_json(
        workdir / SEEDS_FILE, {"runs": runs, "summary": summary, "card": dataclasses.asdict(card)}
    )
    print(f"test of {len(runs)} seeds:\n{format_seeds(tests, summary)}\nprotocol\n{card}")


def summarise_seeds(tests: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean, standard deviation (of a sample; None for one seed) and worst value of each metric.

    `tests` has the metrics of each seed by the names of `metrics.flatten`.
    """
    summary: dict[str, dict[str, float | None]] = {"mean": {}, "std": {}, "worst": {}}
    for name in tests[0]:
        values = [test[name] for test in tests]
        summary["mean"][name] = statistics.fmean(values)
        summary["std"][name] = statistics.stdev(values) if len(values) > 1 else None
        summary["worst"][name] = (max if name.endswith(RANK_METRICS) else min)(values)
    return summary


def format_seeds(
    tests: Mapping[int, Mapping[str, float]], summary: Mapping[str, Mapping[str, float | None]]
) -> str:
    """Formats the metrics of each seed, and their summary, as a table."""
    names = list(summary["mean"])
    rows = {**{f"seed {seed}": test for seed, test in tests.items()}, **summary}
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>{len(name) + 2}}" for name in names)]
    for label, values in rows.items():
        cells = ["-" if values[name] is None else f"{values[name]:.1f}" for name in names]
        padded = (f"{cell:>{len(name) + 2}}" for name, cell in zip(names, cells, strict=True))
        lines.append(f"{label:<{width}}" + "".join(padded))
    return "\n".join(lines)
