"""Checkpoints of a run: saving, choosing and restoring them.

`runs/checkpoint_files.py` describes a checkpoint. The latest checkpoints and the best evaluated one
are kept.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from drl_jax.models.drl import Params
from drl_jax.runs.checkpoint_files import (
    ITEMS,
    CheckpointError,
    DamagedCheckpoint,
    path_name,
    read_arrays,
    read_info,
    read_metric,
    sealed_info,
    stored_params,
    verify_arrays,
    write_metric,
)
from drl_jax.runs.workdir import CHECKPOINTS, Identity, identity_of, shared_run_id
from drl_jax.runtime.distributed import barrier, failing_together, is_main
from drl_jax.runtime.errors import Unavailable, UserError, one_line, system_errors
from drl_jax.training.train_step import TrainState

# Where damaged checkpoints are moved to.
DAMAGED_DIRECTORY = "damaged_checkpoints"
# The devices that hold copies of an array each save a slice of it, if slices have this many bytes.
# By default Orbax slices every array, and saves a small model on 8 devices a third as fast.
_MIN_SLICE_BYTES = 2**20

# It warns of its own settings, also in a notebook, which has no `run_command`.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of a run, as a context manager.

    Leaving the block waits for the last save; without it, an asynchronous save is lost even when
    the program ends normally. With several processes, all of them call each method.

    Attributes:
      identity: of the run. A run without a manifest has the id of its checkpoints; if it has none
        of these either, it gets a new one, unless they are only read.
    """

    def __init__(
        self,
        workdir: Path,
        keep_latest: int = 1,
        *,
        identity: Identity | None = None,
        read_only: bool = False,
    ):
        """Opens the checkpoints of a run; creates the directory unless `read_only`.

        Args:
          identity: as far as it is known; None: `identity_of` the directory.
          read_only: whether another process may write them.

        Raises:
          UserError: the directory cannot be created or read, or has checkpoints of several runs.
        """
        self._directory = (workdir / CHECKPOINTS).absolute()
        self._damaged = workdir / DAMAGED_DIRECTORY
        self._failures: list[BaseException] = []
        if self._directory.exists() and not self._directory.is_dir():
            raise CheckpointError(f"{self._directory} is not a directory; move it away")
        # A reader needs no manager; Orbax gives a directory its name when it is complete.
        self._manager = None if read_only else self._open(keep_latest)
        self.identity = identity_of(workdir) if identity is None else identity
        run = self.identity.run or self._run_of_checkpoints()
        self.identity = self.identity._replace(run=run if read_only else shared_run_id(run))

    def _open(self, keep_latest: int) -> ocp.CheckpointManager:
        whole = ocp.type_handlers.ArrayHandler(
            min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES
        )
        ocp.type_handlers.register_type_handler(jax.Array, whole, override=True)
        handlers = {name: _watched_handler(self._failures) for name in ITEMS}
        handlers["step"] = ocp.JsonCheckpointHandler()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(self.best_step, keep_latest),
            cleanup_tmp_directories=True,
            # If a thread of its own cannot create one, others wait five minutes for it.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=jax.process_count() > 1
            ),
        )
        self.steps()  # Orbax would take a directory that may not be looked at for absent.
        with self._saving("opened"):
            return ocp.CheckpointManager(
                self._directory, item_names=tuple(handlers), item_handlers=handlers, options=options
            )

    def _run_of_checkpoints(self) -> str:
        """The id in the checkpoints; empty if there are none."""
        found = set()
        for step in self.steps():
            with contextlib.suppress(DamagedCheckpoint):
                found.add(read_info(self._directory / str(step))["run"])
        if len(found) > 1:
            raise CheckpointError(
                f"{self._directory} has checkpoints of several runs ({', '.join(sorted(found))}),"
                " and no manifest.json says which is this one; restore that file, or move the"
                " others away"
            )
        return "".join(found)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        # With several processes, closing waits for the others, which may not have failed.
        if self._manager is None or (kind and jax.process_count() > 1):
            return
        # An error of the last save must not hide the one that ended the block.
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
            self.wait()
            with self._saving("closed"):
                self._manager.close()

    # ------------------------------------------------------------ which there are

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints; Unavailable: a directory cannot be read."""
        found = []
        with self._saving("opened"):
            for path in self._directory.iterdir() if self._directory.exists() else ():
                # Another process, a training, may delete it meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    path.stat()
                    found += [int(path.name)] if path.name.isdecimal() else []
        return sorted(found)

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Step of the best evaluated checkpoint; the latest of several equally good ones."""
        values = {step: value for step in self.steps() if (value := self.metric(step)) is not None}
        return max(values, key=lambda step: (values[step], step), default=None)

    def metric(self, step: int) -> float | None:
        """The attached metric of a checkpoint, see `read_metric`."""
        return read_metric(self._directory / str(step), self.identity)

    def with_damaged_metric(self) -> list[int]:
        """Steps of checkpoints whose metric is damaged."""
        damaged = []
        for step in self.steps():
            try:
                self.metric(step)
            except DamagedCheckpoint:
                damaged.append(step)
        return damaged

    def is_evaluated(self, step: int) -> bool:
        """Whether a checkpoint has a metric that is not damaged."""
        try:
            return self.metric(step) is not None
        except DamagedCheckpoint:
            return False

    def find_step(self, name: str) -> int:
        """The step of "best", "latest" or a number; "best" of none that is evaluated: the latest.

        Raises:
          UserError: there is no checkpoint, the name is none of these, or a metric cannot be read.
        """
        if name.isdecimal():
            return int(name)
        if name not in ("best", "latest"):
            raise CheckpointError(f"checkpoint is best, latest or a step, not {name!r}")
        try:
            step = self.best_step() if name == "best" else None
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(
                f"{self._directory}: {error}; name a step instead of best:"
                f" {', '.join(map(str, self.steps()))}"
            ) from error
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"there is no checkpoint in {self._directory} yet")
        return step

    # ------------------------------------------------------------ saving

    def save(self, state: TrainState, **log: Any) -> None:
        """Saves in the background, with JSON values `log`, unless the step is saved already.

        Raises:
          UserError: the state is not finite, or this or the previous save failed.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {"params": state.params, "opt_state": state.opt_state}
        arguments = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
            step=ocp.args.JsonSave(sealed_info(step, self.identity, items, **log)),
        )
        self.wait()
        with self._saving("saved"):
            self._manager.save(step, args=arguments, force=True)

    def wait(self) -> None:
        """Waits until the last save has finished; UserError: it failed."""
        if self._manager is None:
            return
        with self._saving("saved"):
            if jax.process_count() == 1:
                self._manager.wait_until_finished()
                return
            # Orbax waits for the other processes before it reports an error of this one.
            waiting = threading.Thread(target=self._finish, daemon=True)
            waiting.start()
            while waiting.is_alive() and not self._failures:
                waiting.join(timeout=0.1)
            if self._failures:
                raise self._failures[0]

    def _finish(self) -> None:
        try:
            self._manager.wait_until_finished()
        except BaseException as error:
            self._failures.append(error)

    def attach_metric(self, step: int, value: float) -> None:
        """Stores the metric of a checkpoint after its save; errors of `wait` and `write_metric`."""
        self.wait()
        if is_main():
            write_metric(self._directory / str(step), value)
        barrier(f"metric of checkpoint {step}")

    @contextlib.contextmanager
    def _saving(self, action: str) -> Iterator[None]:
        """Reports what the disk or Orbax, which also raises errors of its threads, refuses."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            # Also of a directory that is gone: here, nothing is read that may be damaged.
            if (refused := next(system_errors(error), None)) is not None:
                what = f"a checkpoint in {self._directory}"
                raise Unavailable(what, refused, action) from error
            raise CheckpointError(
                f"checkpoints in {self._directory} cannot be {action}: {one_line(error)}; those"
                " that were saved before are kept"
            ) from error

    # ------------------------------------------------------------ restoring

    def restore_latest(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the latest intact checkpoint, and the values saved with it; None: there is none.

        Damaged ones are moved to `damaged_checkpoints`, with a line on stdout for each.

        Raises:
          CheckpointError: all checkpoints are damaged, or one belongs to another run or model.
          Unavailable: one cannot be read; an earlier one is not used instead.
        """
        # Also of the earlier ones, before a later save deletes them.
        for step in self.steps():
            with contextlib.suppress(DamagedCheckpoint):
                read_info(self._directory / str(step), self.identity)
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self.restore_state(step, abstract)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged)
            return restored
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"no checkpoint in {self._directory} is intact ({reasons}); they are kept: restore"
                " a backup, or train the run again in another directory"
            )
        return None

    def restore_best(self, abstract: Params) -> tuple[int, Params]:
        """Restores the parameters of the best intact checkpoint; damaged ones are moved away.

        Raises:
          UserError: no evaluated checkpoint is intact, or one cannot be read.
        """
        while (step := self.best_step()) is not None:
            params = self.restore_or_set_aside(step, abstract)
            if params is not None:
                return step, params
        raise CheckpointError(
            f"no evaluated checkpoint in {self._directory} is intact; restore one from"
            f" {self._damaged}, or train the run again in another directory"
        )

    def restore_or_set_aside(self, step: int, abstract: Params) -> Params | None:
        """Like `restore_params`; a damaged checkpoint is moved away, and the result is None."""
        try:
            return self.restore_params(step, abstract)
        except DamagedCheckpoint as error:
            self._set_aside({step: str(error)})
            return None

    def restore_params(self, step: int, abstract: Params) -> Params:
        """Restores the parameters of a checkpoint with the shardings of `abstract`.

        Raises:
          DamagedCheckpoint: its files are not as they were saved.
          CheckpointError: there is no such checkpoint, or it is another run's or model's.
          Unavailable: a file cannot be read.
        """
        return self._restore(step, params=abstract)[0]["params"]

    def restore_state(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores a checkpoint, and the values saved with it; errors as of `restore_params`."""
        items, info = self._restore(step, params=abstract.params, opt_state=abstract.opt_state)
        counter = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        return TrainState(counter, items["params"], items["opt_state"]), info

    def _restore(self, step: int, **abstract: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        self.wait()  # It may be in the middle of its save.
        if step not in (steps := self.steps()):
            found = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"no checkpoint of step {step} in {self._directory}; there are: {found}"
            )
        directory = self._directory / str(step)
        # All processes restore the same checkpoint, also if one of them reads other bytes.
        with failing_together(DamagedCheckpoint):
            info = read_info(directory, self.identity)
        # Shapes before Orbax compares them: its own message is pages long.
        stored = {name: tuple(shape) for name, (shape, _, _) in stored_params(info).items()}
        leaves = jax.tree_util.tree_leaves_with_path(abstract["params"])
        wanted = {path_name(path): tuple(leaf.shape) for path, leaf in leaves}
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"checkpoint {step} in {self._directory} is of another model: {name} is"
                    f" {stored.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
                )
        with failing_together(DamagedCheckpoint):
            items = read_arrays(directory, abstract)
        with failing_together(DamagedCheckpoint):
            verify_arrays(info, items)
        return items, info

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Moves damaged checkpoints out of the way of later saves."""
        if not damaged:
            return
        with failing_together(UserError), self._saving("moved"):
            if is_main():
                self._damaged.mkdir(exist_ok=True)
                for step, reason in damaged.items():
                    target = self._damaged / f"{step}_{time.strftime('%Y%m%d_%H%M%S')}"
                    (self._directory / str(step)).rename(target)
                    print(f"checkpoint {step} is damaged: {reason}; moved to {target}")
        self._manager.reload()


# ---------------------------------------------------------------- around Orbax


class _LatestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the latest checkpoints and the best evaluated one; all if a metric cannot be read.

    (Orbax's `best_fn` with `max_to_keep` deletes the latest checkpoint when its metric is poor.)
    """

    def __init__(self, best_step: Callable[[], int | None], keep_latest: int):
        self._best_step, self._keep_latest = best_step, keep_latest

    def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list[bool]:
        del context
        steps = [info.step for info in checkpoints]
        kept = set(sorted(steps)[-self._keep_latest :])
        try:
            kept.add(self._best_step())
        except UserError:
            return [True] * len(steps)
        return [step in kept for step in steps]


def _watched_handler(failures: list[BaseException]) -> ocp.StandardCheckpointHandler:
    """Orbax's handler, which also lists the errors of its background work at once."""
    handler = ocp.StandardCheckpointHandler()
    start, finalize = handler.async_save, handler.finalize

    @contextlib.contextmanager
    def listing() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            failures.append(error)
            raise

    class Watched:
        def __init__(self, future: Any):
            self._future = future

        def result(self, timeout: float | None = None) -> Any:
            with listing():
                return self._future.result(timeout)

    async def async_save(*arguments: Any, **options: Any) -> list | None:
        futures = await start(*arguments, **options)
        return futures and [Watched(future) for future in futures]

    # Not a subclass: Orbax registers what a handler saves by its type.
    handler.async_save, handler.finalize = async_save, listing()(finalize)
    return handler
