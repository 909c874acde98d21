"""A pool of processes that keeps order, bounds memory and survives what its workers run into."""

import collections
import concurrent.futures
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Lost:
    """A call without a result: its process died or took too long."""

    reason: str


def map_in_processes(
    function: Callable[..., T], arguments: Sequence[tuple], *, timeout: float | None = None
) -> Iterator[T | Lost]:
    """`function(*a)` for each `a` of `arguments`, in order, computed by all cores.

    Args:
      function: at the top level of a module; it returns the errors that it expects as values.
      arguments: one tuple a call.
      timeout: seconds that a call may take; the process is then killed, whatever it hangs in.

    Yields:
      The results. At most a few for each core wait for a slow one before them.
    """
    workers = max(1, min(os.cpu_count() or 1, len(arguments)))
    # Spawned, because forking a process in which TFDS or jax runs threads can deadlock.
    pool = ProcessPool(
        workers, context=get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(),)
    )
    waiting: collections.deque[ProcessFuture] = collections.deque()
    try:
        for call in arguments:
            waiting.append(pool.schedule(function, args=call, timeout=timeout))
            if len(waiting) > 8 * workers:
                yield _result(waiting.popleft(), timeout)
        while waiting:
            yield _result(waiting.popleft(), timeout)
    finally:
        pool.stop()
        pool.join()


def _result(future: ProcessFuture, timeout: float | None) -> T | Lost:
    try:
        return future.result()
    except concurrent.futures.TimeoutError:
        return Lost(f"took longer than {timeout:g} s")
    except ProcessExpired as error:
        return Lost(f"the process that worked on it died (exit code {error.exitcode})")


def _start_worker(parent: int) -> None:
    # Ctrl-C reaches every process of a terminal; the one that owns the pool ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A parent that was killed cannot end its workers: they look after themselves."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
