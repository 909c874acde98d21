"""Reads the files of one checkpoint, and checks them against the checksums that were saved with it.

A checkpoint has three items: the arrays `params` and `opt_state`, and `step`, a JSON object: the
step, a summary of every array (`runs/checksums.py`), what the log needs to go on, and its own
hash. All three are written in one atomic step.

Neither Orbax nor TensorStore notices a changed bit of an array: their formats have checksums of
the index alone.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from drl_jax.runs.checksums import ArraySummary, digest, path_name, summarise
from drl_jax.runtime.errors import UserError, one_line
from drl_jax.runtime.files import seal, unseal, write_json

ITEMS = ("params", "opt_state")
# Metric maximised to choose the best checkpoint.
SELECTION_METRIC = "val_t2v_R1"


class CheckpointError(UserError):
    """A checkpoint that is missing, cannot be saved, or belongs to another model."""


class DamagedCheckpoint(CheckpointError):
    """Files of a checkpoint that are not as they were saved; the message is the reason."""


# ---------------------------------------------------------------- the metric


def write_metric(directory: Path, value: float) -> None:
    """Stores the metric of the checkpoint in `directory`, which chooses the best one."""
    write_json(directory / "metrics.json", seal({SELECTION_METRIC: value}))


def read_metric(directory: Path) -> float | None:
    """The metric of the checkpoint in `directory`; None if there is none.

    NaN ranks below every number.

    Raises:
      DamagedCheckpoint: it cannot be read.
    """
    # Runs of version 0.1 have Orbax's own file.
    for path in (directory / "metrics.json", directory / "metrics" / "metrics"):
        with _damage(str(path)):
            try:
                text = path.read_text(encoding="utf-8")
            except (FileNotFoundError, NotADirectoryError):
                continue
            value = float(unseal(text)[SELECTION_METRIC])
            return -math.inf if math.isnan(value) else value
    return None


# ---------------------------------------------------------------- writing


def sealed_info(step: int, items: dict[str, Any], **log: Any) -> dict[str, Any]:
    """The JSON item of a checkpoint.

    Args:
      step: its step.
      items: trees of arrays by name.
      **log: JSON values to restore with it.

    Raises:
      CheckpointError: an array has a value that is not finite.
    """
    arrays, not_finite = summarise(items)
    if not_finite:
        raise CheckpointError(
            f"the state of step {step} is not saved: {not_finite[0]} has values that are not finite"
            f" ({len(not_finite)} such arrays); earlier checkpoints are kept"
        )
    return seal({"step": step, "arrays": {name: list(s) for name, s in arrays.items()}, **log})


# ---------------------------------------------------------------- reading


def read_info(directory: Path) -> dict[str, Any]:
    """Reads the JSON item of the checkpoint in `directory`.

    Raises:
      DamagedCheckpoint: it cannot be read, or is that of another step.
    """
    path = directory / "step" / "metadata"
    with _damage(f"{path.relative_to(directory)}"):
        info = unseal(path.read_text(encoding="utf-8"))
        if info["step"] != int(directory.name):
            raise ValueError(f"it is that of step {info['step']}")
        return info


def stored_shapes(directory: Path, info: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a checkpoint, by path.

    Raises:
      DamagedCheckpoint: a checkpoint without checksums, whose metadata cannot be read.
    """
    if "arrays" in info:
        prefix = "params/"
        return {
            name.removeprefix(prefix): tuple(shape)
            for name, (shape, _, _) in info["arrays"].items()
            if name.startswith(prefix)
        }
    with _damage("params"):
        tree = _array_handler().metadata(epath.Path(directory / "params")).tree
        tree = _rename_keys(tree, {"clip": "backbone"})
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def stored_params_digest(directory: Path) -> str:
    """What `checksums.digest` gives for the parameters of the checkpoint in `directory`.

    Empty for a checkpoint of a version that wrote no checksums.

    Raises:
      DamagedCheckpoint: it cannot be read.
    """
    prefix, arrays = "params/", read_info(directory).get("arrays", {})
    summaries = {
        name.removeprefix(prefix): ArraySummary(*summary)
        for name, summary in arrays.items()
        if name.startswith(prefix)
    }
    return digest(summaries) if summaries else ""


def read_arrays(directory: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads items of a checkpoint in this process, without waiting for others.

    Args:
      directory: that of the checkpoint.
      abstract: shapes, dtypes and shardings of the arrays, by item.

    Raises:
      DamagedCheckpoint: they cannot be read.
    """
    # Version 0.1 called the backbone `clip`, also in the optimiser state.
    with _damage("params"):
        old = "clip" in _array_handler().metadata(epath.Path(directory / "params")).tree
    if old:
        abstract = _rename_keys(abstract, {"backbone": "clip"})
    items = {}
    for name, tree in abstract.items():
        with _damage(name):
            arguments = ocp.args.StandardRestore(tree)
            items[name] = _array_handler().restore(epath.Path(directory / name), args=arguments)
            jax.block_until_ready(items[name])
    return _rename_keys(items, {"clip": "backbone"}) if old else items


def verify_arrays(info: dict[str, Any], items: dict[str, Any]) -> None:
    """Compares arrays with the summaries of their checkpoint, if it has them.

    Raises:
      DamagedCheckpoint: an array is not the one that was saved, or has values that are not finite,
        which earlier versions could save.
    """
    summaries, not_finite = summarise(items)
    if not_finite:
        raise DamagedCheckpoint(f"{not_finite[0]} has values that are not finite")
    for name, found in summaries.items() if "arrays" in info else ():
        shape, dtype, checksum = info["arrays"][name]
        if found != ArraySummary(tuple(shape), dtype, checksum):
            raise DamagedCheckpoint(f"{name} differs from its checksum")


def _rename_keys(tree: Any, names: dict[str, str]) -> Any:
    """Renames dictionary keys at every depth of a tree of dicts and (named) tuples."""
    if isinstance(tree, dict):
        return {names.get(key, key): _rename_keys(value, names) for key, value in tree.items()}
    if isinstance(tree, tuple):
        values = [_rename_keys(value, names) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return tree


def _array_handler() -> ocp.StandardCheckpointHandler:
    # Alone: by default, a process whose files are damaged leaves the others waiting.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={jax.process_index()}
    )
    return ocp.StandardCheckpointHandler(multiprocessing_options=alone)


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    try:
        yield
    except DamagedCheckpoint:
        raise
    # TensorStore, Orbax and json raise many types for damaged files.
    except Exception as error:
        raise DamagedCheckpoint(f"{what} cannot be read ({one_line(error)})") from error
