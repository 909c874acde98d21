"""The files of one checkpoint, checked against the checksums that were saved with it.

A checkpoint has three items: the arrays `params` and `opt_state`, and `step`, a sealed JSON object:
the step, whose it is (`workdir.Identity`), a summary of every array, and what the log needs to go
on. All three are written in one atomic step. Its metric is written later, with the same step and
identity and the digest of the parameters.

Neither Orbax nor TensorStore notices a changed bit of an array: their formats have checksums of
the index alone.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from drl_jax.runs.workdir import FORMAT, UNKNOWN, Identity
from drl_jax.runtime.errors import UserError, one_line, raise_if_refused
from drl_jax.runtime.files import json_sha256, read_all, seal, unseal, write_json

ITEMS = ("params", "opt_state")
# Metric maximised to choose the best checkpoint.
SELECTION_METRIC = "val_t2v_R1"
METRICS_FILE = "metrics.json"
# Elements above which two reductions are faster than one.
_LARGE = 2**16


class CheckpointError(UserError):
    """A checkpoint that is missing, cannot be saved, or is another run's or model's."""


class DamagedCheckpoint(CheckpointError):
    """Files of a checkpoint that are not as they were saved."""


# ---------------------------------------------------------------- checksums


def summarise(tree: Any) -> tuple[dict[str, list], list[str]]:
    """Shape, dtype and checksum of each array by its path, as JSON values, and the paths of those
    with a NaN or an infinity.

    Computed on the devices. A change of one element always changes the checksum (elements have 8,
    16 or 32 bits); any other change leaves it the same with a probability of 2^-32. It does not
    depend on shardings. If arrays are split over several processes, all of them call this.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    # All are started before the first one is waited for.
    results = {name: _summary(leaf) for name, leaf in leaves.items()}
    # The copy of this process: with a replicated array, another process may have another one.
    numbers = {name: np.asarray(x.addressable_data(0)) for name, x in results.items()}
    summaries = {
        name: [list(leaf.shape), leaf.dtype.name, int(numbers[name][0])]
        for name, leaf in leaves.items()
    }
    return summaries, [name for name, (_, bad) in numbers.items() if bad]


def params_digest(params: Any) -> str:
    """SHA-256 of paths, shapes, dtypes and checksums; all processes call it."""
    return json_sha256(summarise(params)[0])


def path_name(path: tuple) -> str:
    """Name of a leaf of a tree of dicts and (named) tuples, e.g. `0/mu/backbone/logit_scale`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def _summary(array: jax.Array) -> jax.Array:
    """uint32 [2]: the sum of the mixed elements, and whether a value is not finite."""
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = array if array.dtype == bool else jax.lax.bitcast_convert_type(array, unsigned)
    # The index of each element in the whole array, so that moved elements are noticed.
    index = jnp.zeros(array.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(array.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * np.uint32(stride % 2**32)
        stride *= array.shape[axis]
    # A bijection of 32 bits (an xor-multiply hash): another element gives another number. A sum can
    # be reduced in any order, on any number of devices.
    mixed = bits.astype(jnp.uint32) ^ (index * np.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x846CA68B)
    mixed ^= mixed >> 16
    floating = jnp.issubdtype(array.dtype, jnp.inexact)
    bad = ~jnp.isfinite(array) if floating else jnp.zeros(array.shape, bool)
    if array.ndim > 1 and array.size > _LARGE:
        mixed, bad = _reduce_rows(mixed, bad)
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.any(bad).astype(jnp.uint32)])


def _reduce_rows(mixed: jax.Array, bad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds up groups of at most 32 rows: XLA parallelises this on CPUs, but no full reduction."""
    rows = mixed.shape[0]
    group = max(size for size in range(1, 33) if rows % size == 0)
    shape = (rows // group, group, *mixed.shape[1:])
    reduced = jax.lax.reduce(
        (mixed.reshape(shape), bad.reshape(shape)),
        (np.uint32(0), np.bool_(False)),
        lambda a, b: (a[0] + b[0], a[1] | b[1]),
        (1,),
    )
    # Otherwise XLA merges this reduction with the next one.
    return jax.lax.optimization_barrier(tuple(reduced))


# ---------------------------------------------------------------- the JSON item


def sealed_info(step: int, identity: Identity, items: dict[str, Any], **log: Any) -> dict[str, Any]:
    """The JSON item of a checkpoint of trees of arrays, with the JSON values `log`.

    Raises:
      CheckpointError: an array has a value that is not finite.
    """
    arrays, not_finite = summarise(items)
    if not_finite:
        raise CheckpointError(
            f"the state of step {step} is not saved: {not_finite[0]} has values that are not finite"
            f" ({len(not_finite)} such arrays); earlier checkpoints are kept"
        )
    about = {"format": FORMAT, "step": step, **identity._asdict()}
    return seal({**about, "arrays": arrays, **log})


def read_info(directory: Path, identity: Identity = UNKNOWN) -> dict[str, Any]:
    """Reads the JSON item of the checkpoint in `directory`, whose name is the step.

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
            f" {FORMAT}); train the run again in another directory"
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


def stored_params(info: dict[str, Any]) -> dict[str, list]:
    """Shape, dtype and checksum of the parameters of a checkpoint, from its JSON item."""
    arrays, prefix = info["arrays"], "params/"
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def owner(directory: Path, identity: Identity = UNKNOWN) -> dict[str, Any]:
    """Step, identity and `params_digest` of a checkpoint, from its JSON item (`read_info`)."""
    info = read_info(directory, identity)
    names = ("step", *Identity._fields)
    return {**{name: info[name] for name in names}, "params": json_sha256(stored_params(info))}


# ---------------------------------------------------------------- the metric


def write_metric(directory: Path, value: float) -> None:
    """Stores the metric of the checkpoint in `directory`, which chooses the best one."""
    directory.stat()  # A run that was moved away meanwhile is not damaged.
    write_json(directory / METRICS_FILE, seal({SELECTION_METRIC: value, **owner(directory)}))


def read_metric(directory: Path, identity: Identity = UNKNOWN) -> float | None:
    """The metric of the checkpoint in `directory`; None if there is none.

    NaN ranks below every number.

    Raises:
      DamagedCheckpoint: it is damaged.
      CheckpointError: it is that of another checkpoint, or see `read_info`.
    """
    path = directory / METRICS_FILE
    with _damage(path):
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
    expected = owner(directory, identity)
    with _damage(path):
        values = unseal(text)
        value = float(values[SELECTION_METRIC])
        other = [f"{name} {values[name]}" for name in expected if values[name] != expected[name]]
    if other:
        raise CheckpointError(
            f"{path} is the metric of another checkpoint ({', '.join(other)}); put that of this"
            " checkpoint back, or move the file away"
        )
    return -math.inf if math.isnan(value) else value


# ---------------------------------------------------------------- arrays


def read_arrays(directory: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads items of a checkpoint; DamagedCheckpoint: one cannot be read."""
    # By default, a process whose files are damaged leaves the others waiting.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={jax.process_index()}
    )
    items = {}
    for name, tree in abstract.items():
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with _damage(directory / name):
            arguments = ocp.args.StandardRestore(tree)
            items[name] = handler.restore(epath.Path(directory / name), args=arguments)
            jax.block_until_ready(items[name])
    return items


def verify_arrays(info: dict[str, Any], items: dict[str, Any]) -> None:
    """Raises DamagedCheckpoint unless arrays have the checksums of their checkpoint."""
    for name, found in summarise(items)[0].items():
        if found != info["arrays"][name]:
            raise DamagedCheckpoint(f"{name} differs from its checksum")


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """An error in the block is damage of a file or directory, unless the system refused it."""
    try:
        yield
    # Devices without the memory for the arrays.
    except jax.errors.JaxRuntimeError:
        raise
    # TensorStore, Orbax and json raise many types for damaged files.
    except Exception as error:
        raise_if_refused(path, error)
        try:
            read_all(path)
        except OSError as reason:
            raise_if_refused(path, reason)
        reason = f"{path.parent.name}/{path.name} is damaged ({one_line(error)})"
        raise DamagedCheckpoint(reason) from error
