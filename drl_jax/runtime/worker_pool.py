"""Calls in processes of this machine: an ordered map with bounded memory, and failures per call.

Python's own pools have no time limit per call, and break when a process dies. As a command, runs a
module that ends with its parent: python -m drl_jax.runtime.worker_pool PARENT MODULE [ARGUMENT ...]
"""

import atexit
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pickle
import queue
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

from drl_jax.runtime.errors import Unavailable, UserError, one_line, refusal
from drl_jax.runtime.resources import available_cpus

T = TypeVar("T")

# Seconds for a process to start and to import what a call needs, and for it to end when killed.
_START_SECONDS, _END_SECONDS = 300.0, 10.0
# Seconds that a selector can wait.
_LONGEST = 2e6


@dataclasses.dataclass(frozen=True)
class WorkerFailure:
    """Result of a call that raised an exception, timed out, or whose process died.

    `reason` is one line. A passing failure is no property of what the call worked on, and must not
    be stored as one: the process died or took too long (`timed_out`), or the operating system
    refused something.
    """

    reason: str
    is_passing: bool = False
    timed_out: bool = False


_ENDED = WorkerFailure("its processes were ended", is_passing=True)

# `map_in_processes`, or the map of a cluster.
OrderedMap = Callable[..., Iterator[Any]]


def map_in_processes(
    function: Callable[..., T],
    arguments: Sequence[tuple],
    *,
    timeout: float | Sequence[float] | None = None,
    ahead: int = 8,
) -> Iterator[T | WorkerFailure]:
    """Yields `function(*a)` for each `a` of `arguments`, in order, from all available processors.

    A call that fails gives a WorkerFailure, and the others continue. A call whose failure is
    passing is repeated once, while no other call runs: together they may need more memory than
    there is.

    Args:
      function: defined at the top level of a module.
      arguments: one tuple for each call.
      timeout: seconds per call, or of each call; the process of a call that takes longer is killed.
      ahead: finished or running calls per worker that are held at a time.
    """
    workers = max(1, min(available_cpus(), len(arguments)))
    calls = list(zip(arguments, limits_of(timeout, arguments), strict=True))
    unsent, waiting = iter(calls), collections.deque()
    with contextlib.closing(CallPool(workers)) as pool:
        for call, seconds in calls:
            for next_call in itertools.islice(unsent, ahead * workers + 1 - len(waiting)):
                waiting.append(pool.submit(function, *next_call))
            result = waiting.popleft().result()
            if isinstance(result, WorkerFailure) and result.is_passing:
                concurrent.futures.wait(waiting)
                # Another process may have what this one lacked, e.g. open files.
                result = pool.submit(function, call, seconds, is_fresh=True).result()
            yield result


def limits_of(
    timeout: float | Sequence[float] | None, arguments: Sequence[tuple]
) -> Sequence[float | None]:
    return timeout if isinstance(timeout, Sequence) else [timeout] * len(arguments)


class CallPool:
    """Processes that wait for calls, which come one by one from any thread.

    A process starts with its first call.
    """

    def __init__(self, workers: int):
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._is_closed, self._lock = threading.Event(), threading.Lock()
        self._workers = [_Worker(self._is_closed) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), daemon=True)
            for worker in self._workers
        ]
        self._threads.append(threading.Thread(target=self._end_stopped, daemon=True))
        for thread in self._threads:
            thread.start()
        # A generator that holds a pool may be closed only when threads run no more.
        atexit.register(self.close)

    def call(
        self, function: Callable[..., T], *arguments: Any, timeout: float | None
    ) -> T | WorkerFailure:
        """Computes `function(*arguments)`, of the top level of a module, or gives a WorkerFailure.

        Its process is killed `timeout` seconds after the start of the call; None: no limit.
        """
        return self.submit(function, arguments, timeout).result()

    def submit(
        self,
        function: Callable,
        arguments: tuple,
        timeout: float | None,
        *,
        is_fresh: bool = False,
    ) -> "concurrent.futures.Future[Any]":
        """Like `call`, without waiting; a fresh call has a new process."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._lock:
            if self._is_closed.is_set():
                future.set_result(_ENDED)
            else:
                self._calls.put((future, is_fresh, (function, arguments, timeout)))
        return future

    def close(self) -> None:
        """Ends the processes and their calls, which fail."""
        atexit.unregister(self.close)
        with self._lock:
            self._is_closed.set()
        for worker in self._workers:
            worker.kill()
            self._calls.put(None)
        end = time.monotonic() + _END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _end_stopped(self) -> None:
        """Kills processes that stop in a transfer; one thread, as a timer for each costs more."""
        while not self._is_closed.wait(1.0):
            for worker in self._workers:
                deadline = worker.deadline  # Its thread may set it to None at any time.
                if deadline is not None and time.monotonic() > deadline:
                    worker.kill()

    def _serve(self, worker: "_Worker") -> None:
        while (item := self._calls.get()) is not None:
            future, is_fresh, call = item
            if is_fresh:
                worker.end()
            future.set_result(_guarded(worker.call, *call))
        worker.end()


class _Worker:
    """A process that runs the calls of one thread, and another one when it is lost."""

    def __init__(self, is_closed: threading.Event):
        self._is_closed = is_closed
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        # Of a transfer, in the time of `time.monotonic`.
        self.deadline: float | None = None

    def call(self, function: Callable, arguments: tuple, timeout: float | None) -> Any:
        call = pickle.dumps((function, arguments))
        if self._is_closed.is_set():
            return _ENDED
        if self._process is None:
            self._start()
        has_started = False
        try:
            with self._transfer():
                self._connection.send_bytes(call)
            content = self._receive(_START_SECONDS)
            if has_started := not content:
                content = self._receive(timeout)
        except (EOFError, OSError) as error:
            is_late = isinstance(error, TimeoutError)
            code = self.end(patience=0.0 if is_late else 1.0)
            if self._is_closed.is_set():
                return _ENDED
            if is_late and has_started:
                reason = f"took longer than {timeout:g} s"
                return WorkerFailure(reason, is_passing=True, timed_out=True)
            reason = f"the process that worked on it died (exit code {code})"
            return WorkerFailure(reason, is_passing=True)
        return pickle.loads(content)

    def _receive(self, seconds: float | None) -> bytes:
        if not self._connection.poll(None if seconds is None else min(seconds, _LONGEST)):
            raise TimeoutError
        with self._transfer():
            return self._connection.recv_bytes()

    @contextlib.contextmanager
    def _transfer(self) -> Iterator[None]:
        """One that the pool ends if the process stops in it: `poll` sees its first byte only."""
        self.deadline = time.monotonic() + _START_SECONDS
        try:
            yield
        finally:
            self.deadline = None

    def kill(self) -> None:
        if (process := self._process) is not None:
            process.kill()

    def end(self, patience: float = 0.0) -> int | None:
        """Waits for the end of the process, then kills it; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._connection.close()
        for seconds in (patience, _END_SECONDS):
            end = time.monotonic() + seconds
            # Not `wait`: where another thread has seen the end, the code may come a moment later.
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.001)
            process.kill()
        return process.poll()

    def _start(self) -> None:
        # A new interpreter: forking a process in which TFDS or jax runs threads can deadlock, and
        # what multiprocessing spawns runs the script of its parent again.
        self._connection, other = Pipe()
        start = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve_calls"
        code = f"{start}; _serve_calls({other.fileno()}, {os.getpid()})"
        # Ctrl-C reaches every process of a terminal, and the owner of the pool ends its workers:
        # they inherit that this thread blocks it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        with contextlib.closing(other):
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[other.fileno()]
            )
        if self._is_closed.is_set():  # `close` may not have seen the process.
            self.kill()


def _serve_calls(handle: int, parent: int) -> None:
    connection = Connection(handle)
    _exit_with_parent(parent)
    with contextlib.suppress(EOFError, OSError):  # The parent has ended.
        while True:
            result = _guarded(_run, connection, connection.recv_bytes())
            content = _guarded(pickle.dumps, result)
            connection.send_bytes(content if isinstance(content, bytes) else pickle.dumps(content))


def _run(connection: Connection, call: bytes) -> Any:
    function, arguments = pickle.loads(call)
    # Its modules are imported: the time of the call starts.
    connection.send_bytes(b"")
    return function(*arguments)


def _guarded(function: Callable[..., T], *arguments: Any) -> T | WorkerFailure:
    """Whatever one call raises must not end the others, nor be sent: some exceptions cannot be."""
    try:
        return function(*arguments)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else one_line(error)
        is_passing = isinstance(error, Unavailable) or refusal(error) is not None
        return WorkerFailure(reason, is_passing=is_passing)


# ---------------------------------------------------------------- a child that runs a module


def run_module(module: str, *arguments: str) -> int:
    """Exit status of `python -m MODULE ARGUMENT ...`, which ends with this process if killed."""
    child = [sys.executable, "-m", __name__, str(os.getpid()), module, *arguments]
    return subprocess.run(child).returncode


def _exit_with_parent(parent: int) -> None:
    """Ends this process when its parent has ended: a process that is killed cannot end others."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _exit_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
