"""Checkpoints of a run: the only room that knows Orbax.

A checkpoint is three items, `params`, `opt_state` and `step`, so that evaluation reads the first
alone. Those kept are the last few and the best of those that were evaluated.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from drl_jax.models.drl import Params
from drl_jax.runtime.errors import UserError
from drl_jax.training.state import TrainState

DIRECTORY = "checkpoints"
# The metric that the best checkpoint has most of.
SELECTION_METRIC = "val_t2v_R1"


class CheckpointError(UserError):
    """A checkpoint that is absent or belongs to another model."""


class Checkpoints:
    """The checkpoints of a run; use it in a `with` block, which waits for the last save.

    (Without the wait the last asynchronous save is lost, even when a program ends normally.)
    """

    def __init__(self, workdir: Path, keep_latest: int = 1, *, read_only: bool = False):
        """Opens the checkpoints of a run; creates them unless `read_only`."""
        best = checkpoint_managers.BestN(
            get_metric_fn=_selection_metric, n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            (workdir / DIRECTORY).absolute(),
            item_names=("params", "opt_state", "step"),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "opt_state": ocp.StandardCheckpointHandler(),
                "step": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                best_fn=_selection_metric,
                best_mode="max",
                # `max_to_keep` with `best_fn` would delete the latest checkpoint when its metric
                # is poor, and the run would resume from an old one.
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(keep_latest), best]
                ),
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
        """Step of the best evaluated checkpoint."""
        return self._manager.best_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        """Saves in the background. `metrics` must hold SELECTION_METRIC, if given."""
        step = int(state.step)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            step=ocp.args.JsonSave({"step": step}),
        )
        # An epoch may end where a checkpoint was already saved: that one has no metrics.
        if step in self._manager.all_steps():
            self._manager.delete(step)
        self._manager.save(step, args=items, metrics=metrics, force=True)

    def find_step(self, name: str) -> int:
        """The step of a checkpoint by name: "best", "latest" or a number.

        A run that was never evaluated has no best one; it is then the latest.

        Raises:
          CheckpointError: there is none, or the name is none of these.
        """
        if name.isdigit():
            return int(name)
        if name not in ("best", "latest"):
            raise CheckpointError(f"--checkpoint is best, latest or a step, not {name!r}")
        step = self.best_step() if name == "best" else None
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"there is no checkpoint in {self._manager.directory} yet")
        return step

    def restore_params(self, step: int, abstract: Params) -> Params:
        """Parameters of a checkpoint in the layout of `abstract`.

        Raises:
          CheckpointError: there is no such checkpoint, or its parameters have other shapes.
        """
        self._check(step, abstract)
        items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=items)["params"]

    def restore_state(self, step: int, abstract: TrainState) -> TrainState:
        """The whole state of a checkpoint in the layout of `abstract`.

        Raises:
          CheckpointError: see `restore_params`.
        """
        self._check(step, abstract.params)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
        )
        restored = self._manager.restore(step, args=items)
        counter = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        return TrainState(counter, restored["params"], restored["opt_state"])

    def _check(self, step: int, abstract: Params) -> None:
        """Compares shapes before Orbax reads: its own message is pages long."""
        self._manager.wait_until_finished()  # the save may be this very moment's
        if step not in self._manager.all_steps():
            found = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"no checkpoint of step {step} in {self._manager.directory}; there are: {found}"
            )
        stored = _shapes(self._manager.item_metadata(step)["params"].tree)
        wanted = _shapes(abstract)
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"checkpoint {step} in {self._manager.directory} is of another model: {name} is"
                    f" {stored.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
                )


def _selection_metric(metrics: Mapping[str, float]) -> float:
    value = metrics[SELECTION_METRIC]
    return -math.inf if math.isnan(value) else value


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        "/".join(str(entry.key) for entry in path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
