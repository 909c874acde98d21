"""Interpolation between two models: what fine-tuning gains on a task, and what it forgets."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from drl_jax.config import Config
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.evaluation.evaluator import Evaluator
from drl_jax.models.drl import Params
from drl_jax.models.tokenizers import with_tokenizer
from drl_jax.runs.evaluate_run import checked_split, open_evaluation
from drl_jax.runs.protocol_card import evaluation_path
from drl_jax.runs.run_params import remake_initial_params, restore_params
from drl_jax.runs.weights_writer import merged, save_weights, write_tokenizer
from drl_jax.runs.workdir import load_config
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_json
from drl_jax.runtime.sharding import make_layout
from drl_jax.weights.load import config_of_weights, initial_params
from drl_jax.weights.source import is_weights
from drl_jax.weights.weights_file import read_weights


def mix(start: Params, end: Params, alpha: float) -> Params:
    """(1 - alpha) start + alpha end of the parameters that both have, and the others of `end`.

    Raises:
      UserError: their towers have other sizes, or they share no parameter.
    """
    flat, other = flatten_dict(start), flatten_dict(end)
    shared = [path for path in other if path in flat]
    for path in list(shared):
        if flat[path].shape != other[path].shape:
            if path[0] == "backbone":
                name, shapes = "/".join(map(str, path)), (flat[path].shape, other[path].shape)
                raise UserError(f"the towers differ: {name} is {shapes[0]} and {shapes[1]}")
            shared.remove(path)
    if not shared:
        raise UserError("the two models share no parameter")
    mixed = {path: (1.0 - alpha) * flat[path] + alpha * other[path] for path in shared}
    return unflatten_dict(other | mixed)


def interpolate(start: str, end: str, target: Path, alpha: float) -> None:
    """Writes the interpolation of two files of weights or runs, with the configuration of `end`.

    Adapters are merged first. Of a run, it is the best checkpoint.

    Raises:
      UserError: see `mix`; the towers are of another description, `alpha` is not in [0, 1], one of
        them cannot be read, or `target` cannot be written.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is from 0 to 1, not {alpha:g}")
    (other, first), (config, last) = map(_whole, (start, end))
    found = other.model.backbone.of_towers
    for name, value in config.model.backbone.of_towers.items():
        if found[name] != value:
            raise UserError(f"the towers differ: {name} is {found[name]} and {value}")
    mixed = mix(first, last, alpha)
    if config.model.tokenizer:
        config = with_tokenizer(config, write_tokenizer(Path(config.model.tokenizer), target))
    save_weights(target, mixed, config)


def _whole(source: str) -> tuple[Config, Params]:
    """Configuration and parameters without adapters of a file or a run; new heads are left out."""
    if is_weights(source):
        weights = read_weights(source)
        config = config_of_weights(weights)
        params = initial_params(config.model, weights, jax.random.key(0))
        if not weights.has_heads:
            params = {"backbone": params["backbone"]}
        return config, params
    config = load_config(Path(source))
    return merged(config, restore_params(Path(source), config.model, make_layout(), "best")[1])


def evaluate_alphas(
    workdir: Path,
    config: Config,
    alphas: Sequence[float],
    *,
    second: str = "",
    checkpoint: str = "best",
    split_name: str = "test",
) -> list[dict[str, float]]:
    """Evaluates interpolations of a run with the weights that it started from; prints a table.

    Args:
      alphas: 0 is the start, which is always evaluated, and 1 the checkpoint; heads that the start
        lacks are those of the checkpoint.
      second: a built dataset with the same storage, on whose *test* forgetting is measured: the
        t2v R@1 of the start less that of the interpolation, both as the start compares: bare towers
        without heads. Empty: none.
      The others are those of `evaluate_run.evaluate`.

    Returns:
      A row for each alpha, which `alphas_SPLIT_STEP.json` has, too.

    Raises:
      UserError: the run started from random parameters, or see `evaluate_run.evaluate`.
    """
    if not config.model.init:
        raise UserError(f"the run in {workdir} started from random parameters; nothing to mix with")
    opened = open_evaluation(
        workdir, config, checkpoint=checkpoint, split_name=split_name, frame_order="time"
    )
    layout = make_layout(fsdp=config.sharding.fsdp)
    start = merged(config, remake_initial_params(workdir, config, layout))[1]
    model = config.model
    has_heads = read_weights(model.init, model.release, model.weights_key).has_heads
    if not has_heads:
        start = {"backbone": start["backbone"]}
    config, end = merged(config, opened.params)
    tasks = {"": (Evaluator(config, opened.dataset, layout), opened.split)}
    if second:
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=second))
        if not has_heads:
            bare = dataclasses.replace(config.model, interaction="dp", agg_module="none")
            other = dataclasses.replace(other, model=bare)
        dataset = VideoDataset(dataset_dir(other))
        split = checked_split(dataset, "test", other)
        tasks["second_"] = (Evaluator(other, dataset, layout), split)
    rows: list[dict[str, float]] = []
    for alpha in sorted({0.0, *alphas}):
        params = jax.device_put(mix(start, end, jnp.float32(alpha)), layout.parameters(end))
        row: dict[str, Any] = {"alpha": alpha}
        for prefix, (evaluator, split) in tasks.items():
            # Of the second dataset, only the towers if the start has no more.
            given = {name: params[name] for name in start} if prefix else params
            metrics = evaluator.run(given, split).metrics
            row |= {f"{prefix}{way}_R@1": metrics[way]["R@1"] for way in ("t2v", "v2t")}
        rows.append(row)
        if second:
            row["forgetting"] = rows[0]["second_t2v_R@1"] - row["second_t2v_R@1"]
        if len(rows) == 1:
            print("  ".join(f"{name:>14}" for name in row))
        print("  ".join(f"{value:14.2f}" for value in row.values()), flush=True)
    path = evaluation_path(workdir, split_name, opened.card.step)
    path = path.with_name(path.name.replace("eval_", "alphas_", 1))
    write_json(path, {"dataset": config.data.dataset, "second": second, "rows": rows})
    return rows
