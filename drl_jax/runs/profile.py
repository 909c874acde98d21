"""A profile of a few steps of a run, on request."""

from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from drl_jax.runs.nonfinite import TrainingError
from drl_jax.runs.wall_time import WallTime
from drl_jax.runtime.distributed import is_main
from drl_jax.runtime.errors import one_line


class StepProfile:
    """Traces some steps into `plugins/profile` of a run; a context manager.

    Process 0 traces its own devices.
    """

    def __init__(self, workdir: Path, steps: range, wall_time: WallTime):
        """Writes nothing yet.

        Args:
          workdir: directory of the run.
          steps: the steps to trace, from 1; empty: none.
          wall_time: waiting for the devices and writing is spent on "profile".
        """
        self._workdir, self._steps, self._wall_time = workdir, steps, wall_time
        self._tracing = False

    def before(self, step: int, state: Any) -> None:
        """Begins the trace if `step` is one of the steps, when the devices have made `state`."""
        if step in self._steps and is_main() and not self._tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._workdir)
            self._tracing = True
            self._wall_time.spent_on("profile")

    def after(self, step: int, state: Any) -> None:
        """Writes the trace if `step` is the last of the steps, when the devices have made `state`.

        Raises:
          TrainingError: it cannot be written.
        """
        if self._tracing and step + 1 not in self._steps:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        directory = self._workdir / "plugins" / "profile"
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"the profile cannot be written to {directory}: {one_line(error)}"
            ) from error
        tqdm.write(f"the profile is in {directory}")
        self._wall_time.spent_on("profile")

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *exception: object) -> None:
        # A run that stops meanwhile.
        if self._tracing:
            self._stop()
