"""Reads the files of one checkpoint, and checks them against the checksums that were saved with it.

A checkpoint has three items: the arrays `params` and `opt_state`, and `step`, a JSON object: the
step, whose it is (`runs/identity.py`), a summary of every array (`runs/checksums.py`), what the log
needs to go on, and its own hash. All three are written in one atomic step. Its metric is written
later, with the same step and identity and the digest of the parameters.

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

from drl_jax.runs.checksums import ArraySummary, digest, summarise
from drl_jax.runs.identity import UNKNOWN, Identity
from drl_jax.runs.workdir import FORMAT
from drl_jax.runtime.errors import UserError, one_line, raise_if_refused
from drl_jax.runtime.files import read_all, seal, unseal, write_json

ITEMS = ("params", "opt_state")
# Metric maximised to choose the best checkpoint.
SELECTION_METRIC = "val_t2v_R1"
METRICS_FILE = "metrics.json"


class CheckpointError(UserError):
    """A checkpoint that is missing, cannot be saved, or is another run's or model's."""


class DamagedCheckpoint(CheckpointError):
    """Files of a checkpoint that are not as they were saved; the message is the reason."""


# ---------------------------------------------------------------- the metric


def write_metric(directory: Path, value: float) -> None:
    """Stores the metric of the checkpoint in `directory`, which chooses the best one.

    Raises:
      DamagedCheckpoint: the checkpoint is damaged.
      OSError: the metric cannot be written.
    """
    directory.stat()  # A run that was moved away meanwhile is not damaged.
    write_json(directory / METRICS_FILE, seal({SELECTION_METRIC: value, **owner(directory)}))


def read_metric(directory: Path, identity: Identity = UNKNOWN) -> float | None:
    """The metric of the checkpoint in `directory`; None if there is none.

    NaN ranks below every number.

    Args:
      directory: that of the checkpoint.
      identity: of the run.

    Raises:
      DamagedCheckpoint: it is damaged.
      CheckpointError: it is that of another checkpoint, or see `read_info`.
    """
    path = directory / METRICS_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    expected = owner(directory, identity)
    try:
        values = unseal(text)
        value = float(values[SELECTION_METRIC])
        other = [f"{name} {values[name]}" for name in expected if values[name] != expected[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if other:
        raise CheckpointError(
            f"{path} is the metric of another checkpoint ({', '.join(other)}); put that of this"
            " checkpoint back, or move the file away"
        )
    return -math.inf if math.isnan(value) else value


# ---------------------------------------------------------------- writing


def sealed_info(step: int, identity: Identity, items: dict[str, Any], **log: Any) -> dict[str, Any]:
    """The JSON item of a checkpoint.

    Args:
      step: its step.
      identity: of its run.
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
    summaries = {name: list(summary) for name, summary in arrays.items()}
    about = {"format": FORMAT, "step": step, **identity._asdict()}
    return seal({**about, "arrays": summaries, **log})


# ---------------------------------------------------------------- reading


def read_info(directory: Path, identity: Identity = UNKNOWN) -> dict[str, Any]:
    """Reads the JSON item of the checkpoint in `directory`.

    Args:
      directory: that of the checkpoint; its name is the step.
      identity: of the run.

    Raises:
      DamagedCheckpoint: it is damaged.
      CheckpointError: it is that of another run, configuration, dataset, step or version.
    """
    path = directory / "step" / "metadata"
    with _damage(path):
        info = unseal(path.read_text(encoding="utf-8"))
    if info.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory} is of another version (format {info.get('format', 1)}, this one reads"
            f" {FORMAT}); train the run again with another --workdir"
        )
    with _damage(path):
        other = identity.differences(Identity(*(info[name] for name in Identity._fields)))
        if info["step"] != int(directory.name):
            other.append(f"step {info['step']}")
    if other:
        raise CheckpointError(
            f"{directory} is not a checkpoint of this run and step: it is of {', '.join(other)}; it"
            " is kept: move it away, or put back the files of this run"
        )
    return info


def stored_params(info: dict[str, Any]) -> dict[str, ArraySummary]:
    """Summaries of the parameters of a checkpoint by path, from its JSON item."""
    prefix = "params/"
    return {
        name.removeprefix(prefix): ArraySummary(tuple(shape), dtype, checksum)
        for name, (shape, dtype, checksum) in info["arrays"].items()
        if name.startswith(prefix)
    }


def owner(directory: Path, identity: Identity = UNKNOWN) -> dict[str, Any]:
    """Step, identity, and `checksums.digest` of the parameters of the checkpoint in `directory`.

    Raises:
      CheckpointError: see `read_info`.
    """
    info = read_info(directory, identity)
    names = ("step", *Identity._fields)
    return {**{name: info[name] for name in names}, "params": digest(stored_params(info))}


def read_arrays(directory: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads items of a checkpoint in this process, without waiting for others.

    Args:
      directory: that of the checkpoint.
      abstract: shapes, dtypes and shardings of the arrays, by item.

    Raises:
      DamagedCheckpoint: they cannot be read.
    """
    items = {}
    for name, tree in abstract.items():
        with _damage(directory / name):
            arguments = ocp.args.StandardRestore(tree)
            items[name] = _array_handler().restore(epath.Path(directory / name), args=arguments)
            jax.block_until_ready(items[name])
    return items


def verify_arrays(info: dict[str, Any], items: dict[str, Any]) -> None:
    """Compares arrays with the summaries of their checkpoint.

    Raises:
      DamagedCheckpoint: an array is not the one that was saved.
    """
    for name, found in summarise(items)[0].items():
        shape, dtype, checksum = info["arrays"][name]
        if found != ArraySummary(tuple(shape), dtype, checksum):
            raise DamagedCheckpoint(f"{name} differs from its checksum")


def _array_handler() -> ocp.StandardCheckpointHandler:
    # Alone: by default, a process whose files are damaged leaves the others waiting.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={jax.process_index()}
    )
    return ocp.StandardCheckpointHandler(multiprocessing_options=alone)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    # Devices without the memory for the arrays.
    except jax.errors.JaxRuntimeError:
        raise
    # TensorStore, Orbax and json raise many types for damaged files.
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DamagedCheckpoint:
    """The error of a damaged file or directory of a checkpoint, unless it was refused."""
    raise_if_refused(path, error)
    try:
        read_all(path)
    except OSError as reason:
        raise_if_refused(path, reason)
    return DamagedCheckpoint(f"{path.parent.name}/{path.name} is damaged ({one_line(error)})")
