"""Checkpoints of a run. The only module that imports Orbax.

A checkpoint has three items, `params`, `opt_state` and `step`, so that evaluation can read the
parameters alone. Its metric is attached later, in `metrics.json`. The latest checkpoints and the
best evaluated one are kept.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from drl_jax.config import ModelConfig
from drl_jax.models.drl import Params, abstract_params
from drl_jax.runtime.distributed import barrier, is_main
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_json
from drl_jax.sharding import Layout
from drl_jax.training.state import TrainState

DIRECTORY = "checkpoints"
# Metric maximised to choose the best checkpoint.
SELECTION_METRIC = "val_t2v_R1"


class CheckpointError(UserError):
    """A checkpoint that is missing or belongs to another model."""


class Checkpoints:
    """The checkpoints of a run, as a context manager.

    Leaving the block waits for the last save; without it, an asynchronous save is lost even when
    the program ends normally.
    """

    def __init__(self, workdir: Path, keep_latest: int = 1, *, read_only: bool = False):
        """Opens the checkpoints of a run; creates the directory unless `read_only`."""
        self._directory = (workdir / DIRECTORY).absolute()
        with _without_warnings():
            self._manager = ocp.CheckpointManager(
                self._directory,
                item_names=("params", "opt_state", "step"),
                item_handlers={
                    "params": ocp.StandardCheckpointHandler(),
                    "opt_state": ocp.StandardCheckpointHandler(),
                    "step": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_LatestAndBest(self, keep_latest),
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                ),
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Step of the best evaluated checkpoint; the latest of several equally good ones."""
        values = {step: value for step in self.steps() if (value := self.metric(step)) is not None}
        return max(values, key=lambda step: (values[step], step), default=None)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def metric(self, step: int) -> float | None:
        """Value of SELECTION_METRIC that is attached to a checkpoint; None if there is none.

        NaN ranks below every number.
        """
        directory = self._directory / str(step)
        # Runs of version 0.1 have Orbax's own file.
        for path in (directory / "metrics.json", directory / "metrics" / "metrics"):
            if path.is_file():
                value = json.loads(path.read_text(encoding="utf-8"))[SELECTION_METRIC]
                return -math.inf if math.isnan(value) else value
        return None

    def save(self, state: TrainState) -> None:
        """Saves in the background; does nothing if the step is saved already."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            step=ocp.args.JsonSave({"step": step}),
        )
        self._manager.save(step, args=items, force=True)

    def attach_metric(self, step: int, value: float) -> None:
        """Stores the metric of a saved checkpoint; waits until the save has finished."""
        self._manager.wait_until_finished()
        if is_main():
            write_json(self._directory / str(step) / "metrics.json", {SELECTION_METRIC: value})
        barrier(f"metric of checkpoint {step}")

    def find_step(self, name: str) -> int:
        """Resolves the name of a checkpoint: "best", "latest" or a number.

        Without an evaluated checkpoint, "best" is the latest.

        Raises:
          CheckpointError: there is no checkpoint, or the name is none of these.
        """
        if name.isdigit():
            return int(name)
        if name not in ("best", "latest"):
            raise CheckpointError(f"checkpoint is best, latest or a step, not {name!r}")
        step = self.best_step() if name == "best" else None
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"there is no checkpoint in {self._directory} yet")
        return step

    def restore_params(self, step: int, abstract: Params) -> Params:
        """Restores the parameters of a checkpoint with the shardings of `abstract`.

        Raises:
          CheckpointError: there is no such checkpoint, or its parameters have other shapes.
        """
        return self._restore(step, params=abstract)["params"]

    def restore_state(self, step: int, abstract: TrainState) -> TrainState:
        """Restores the state of a checkpoint with the shardings of `abstract`.

        Raises:
          CheckpointError: see `restore_params`.
        """
        items = self._restore(step, params=abstract.params, opt_state=abstract.opt_state)
        counter = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        return TrainState(counter, items["params"], items["opt_state"])

    def _restore(self, step: int, **abstract: Any) -> dict[str, Any]:
        stored = self._stored_params(step)
        # Version 0.1 called the backbone `clip`, also in the optimiser state.
        renamed = "clip" in stored and "backbone" not in stored
        if renamed:
            abstract = _rename_keys(abstract, {"backbone": "clip"})
        self._check(step, _shapes(stored), _shapes(abstract["params"]))
        items = ocp.args.Composite(
            **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        )
        restored = dict(self._manager.restore(step, args=items).items())
        return _rename_keys(restored, {"clip": "backbone"}) if renamed else restored

    def _stored_params(self, step: int) -> Any:
        """Metadata of the parameters of a checkpoint."""
        self._manager.wait_until_finished()  # The checkpoint may be in the middle of its save.
        if step not in self._manager.all_steps():
            found = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"no checkpoint of step {step} in {self._directory}; there are: {found}"
            )
        return self._manager.item_metadata(step)["params"].tree

    def _check(self, step: int, stored: dict, wanted: dict) -> None:
        """Compares shapes before Orbax does: its own message is pages long."""
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"checkpoint {step} in {self._directory} is of another model: {name} is"
                    f" {stored.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
                )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns of every option that a read-only manager ignores."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


class _LatestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the latest checkpoints and the best evaluated one.

    (Orbax's `best_fn` with `max_to_keep` deletes the latest checkpoint when its metric is poor.)
    """

    def __init__(self, checkpoints: Checkpoints, keep_latest: int):
        self._checkpoints, self._keep_latest = checkpoints, keep_latest

    def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list[bool]:
        del context
        steps = [info.step for info in checkpoints]
        kept = {*sorted(steps)[-self._keep_latest :], self._checkpoints.best_step()}
        return [step in kept for step in steps]


def _rename_keys(tree: Any, names: dict[str, str]) -> Any:
    """Renames dictionary keys at every depth of a tree of dicts and (named) tuples."""
    if isinstance(tree, dict):
        return {names.get(key, key): _rename_keys(value, names) for key, value in tree.items()}
    if isinstance(tree, tuple):
        values = [_rename_keys(value, names) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return tree


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        "/".join(str(entry.key) for entry in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def restore_params(
    workdir: Path, model: ModelConfig, layout: Layout, checkpoint: str
) -> tuple[int, Params]:
    """Restores the parameters of a run.

    Args:
      workdir: directory of the run.
      model: its model.
      layout: shardings of the parameters.
      checkpoint: "best", "latest" or a step.

    Returns:
      The step and the parameters.

    Raises:
      CheckpointError: the run has no such checkpoint.
    """
    if not (workdir / DIRECTORY).is_dir():
        raise CheckpointError(f"no checkpoints in {workdir}; training writes one after each epoch")
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.find_step(checkpoint)
        return step, checkpoints.restore_params(step, abstract_params(model, layout))
