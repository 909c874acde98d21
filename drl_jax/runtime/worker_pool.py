"""Ordered map over a pool of processes, with bounded memory and per-call failures."""

import collections
import concurrent.futures
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from drl_jax.runtime.child_process import exit_with_parent
from drl_jax.runtime.errors import one_line
from drl_jax.runtime.resources import available_cpus

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class WorkerFailure:
    """Result of a call that raised an exception, timed out, or whose process died.

    Attributes:
      reason: one line.
      timed_out: whether it took longer than it was allowed to.
    """

    reason: str
    timed_out: bool = False


class OrderedMap(Protocol):
    """What `map_in_processes` does, on whatever runs the calls."""

    def __call__(
        self,
        function: Callable[..., T],
        arguments: Sequence[tuple],
        *,
        timeout: float | Sequence[float] | None = None,
        ahead: int = 8,
    ) -> Iterator[T | WorkerFailure]:
        """See `map_in_processes`."""


def map_in_processes(
    function: Callable[..., T],
    arguments: Sequence[tuple],
    *,
    timeout: float | Sequence[float] | None = None,
    ahead: int = 8,
) -> Iterator[T | WorkerFailure]:
    """Computes `function(*a)` for each `a` of `arguments`, in order, on all available processors.

    Args:
      function: defined at the top level of a module.
      arguments: one tuple for each call.
      timeout: seconds per call, or of each call; the process of a call that takes longer is killed.
      ahead: finished or running calls per worker that are held at a time.

    Yields:
      The results in order; a call that fails gives a WorkerFailure, and the others continue.
    """
    workers = max(1, min(available_cpus(), len(arguments)))
    # Spawned: forking a process in which TFDS or jax runs threads can deadlock.
    pool = ProcessPool(
        workers, context=get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(),)
    )
    timeouts = timeout if isinstance(timeout, Sequence) else [timeout] * len(arguments)
    waiting: collections.deque[tuple[ProcessFuture, float | None]] = collections.deque()
    try:
        for call, seconds in zip(arguments, timeouts, strict=True):
            future = pool.schedule(_guarded, args=(function, *call), timeout=seconds)
            waiting.append((future, seconds))
            if len(waiting) > ahead * workers:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        pool.stop()
        pool.join()


class CallPool:
    """Processes that wait for calls, which come one by one from any thread."""

    def __init__(self, workers: int):
        """Starts no process before the first call.

        Args:
          workers: number of processes.
        """
        self._pool = ProcessPool(
            workers,
            context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(os.getpid(),),
        )

    def call(
        self, function: Callable[..., T], *arguments: Any, timeout: float | None
    ) -> T | WorkerFailure:
        """Computes `function(*arguments)`; a call that fails gives a WorkerFailure.

        Args:
          function: defined at the top level of a module.
          arguments: of the function.
          timeout: seconds from the start of the call; then its process is killed. None: no limit.
        """
        future = self._pool.schedule(_guarded, args=(function, *arguments), timeout=timeout)
        return _result(future, timeout)

    def close(self) -> None:
        """Ends the processes and their calls."""
        self._pool.stop()
        self._pool.join()


def _result(future: ProcessFuture, timeout: float | None) -> T | WorkerFailure:
    try:
        return future.result()
    except concurrent.futures.TimeoutError:
        return WorkerFailure(f"took longer than {timeout:g} s", timed_out=True)
    except ProcessExpired as error:
        return WorkerFailure(f"the process that worked on it died (exit code {error.exitcode})")
    # A result that cannot be sent to this process.
    except Exception as error:
        return WorkerFailure(one_line(error))


def _guarded(function: Callable[..., T], *arguments: Any) -> T | WorkerFailure:
    """Whatever one call raises must not end the others, nor be sent: some exceptions cannot be."""
    try:
        return function(*arguments)
    except Exception as error:
        return WorkerFailure(one_line(error))


def _start_worker(parent: int) -> None:
    # Ctrl-C reaches every process of a terminal; the owner of the pool ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent(parent)
