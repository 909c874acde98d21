"""A pool of processes that keeps order and bounds memory."""

import collections
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")


def map_in_processes(function: Callable[..., T], arguments: Sequence[tuple]) -> Iterator[T]:
    """`function(*a)` for each `a` of `arguments`, in order, computed by all cores.

    Args:
      function: at the top level of a module; it returns errors as values.
      arguments: one tuple a call.

    Yields:
      The results. At most a few for each core wait for a slow one before them.
    """
    workers = max(1, min(os.cpu_count() or 1, len(arguments)))
    # Spawned, because forking a process in which TFDS or jax runs threads can deadlock.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_ctrl_c) as pool:
        waiting: collections.deque[Future[T]] = collections.deque()
        try:
            for call in arguments:
                waiting.append(pool.submit(function, *call))
                if len(waiting) > 8 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _ignore_ctrl_c() -> None:
    """Ctrl-C reaches every process of a terminal; the one that owns the pool ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
