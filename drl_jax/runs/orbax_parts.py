"""What `runs/checkpoints.py` needs around Orbax: its handler and its policy."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from drl_jax.runtime.errors import UserError

# The devices that hold copies of an array each save a slice of it, if slices have this many bytes.
# By default Orbax slices every array, and saves a small model on 8 devices a third as fast.
_MIN_SLICE_BYTES = 2**20


def save_small_arrays_whole() -> None:
    """Registers Orbax's handler of arrays with that limit, for this process."""
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def watched_handler(failures: list[BaseException]) -> ocp.StandardCheckpointHandler:
    """Orbax's handler, which also lists the errors of its background work at once."""
    handler = ocp.StandardCheckpointHandler()
    start, finalize = handler.async_save, handler.finalize

    async def async_save(*arguments: Any, **options: Any) -> list | None:
        futures = await start(*arguments, **options)
        return futures and [_WatchedFuture(future, failures) for future in futures]

    def watched_finalize(*arguments: Any) -> None:
        with _listing(failures):
            finalize(*arguments)

    # Not a subclass: Orbax registers what a handler saves by its type.
    handler.async_save, handler.finalize = async_save, watched_finalize
    return handler


class _WatchedFuture:
    """Waits for a future and lists its error."""

    def __init__(self, future: Any, failures: list[BaseException]):
        self._future, self._failures = future, failures

    def result(self, timeout: float | None = None) -> Any:
        with _listing(self._failures):
            return self._future.result(timeout)


@contextlib.contextmanager
def _listing(failures: list[BaseException]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        failures.append(error)
        raise


class LatestAndBest(checkpoint_managers.PreservationPolicy):
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


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Orbax warns of every option that a read-only manager ignores."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
