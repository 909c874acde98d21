"""Runs of several processes: start-up with a time limit, and agreement between processes."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

# JAX has no public way to its key-value store.
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from drl_jax.runtime.errors import UserError

# Key of the message of the first process that ends with an error, and seconds between two looks.
_FAILURE_KEY, _FAILURE_POLL = "drl_jax/failure", 1.0
_ending = threading.Event()
# Bytes of an error message that processes exchange.
_MESSAGE_BYTES = 1000


class DistributedError(UserError):
    """Arguments that describe no cluster, or processes that cannot connect."""


def initialize(
    mode: str,
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: str | None = None,
    timeout: int = 300,
) -> None:
    """Joins the processes of a run; must be called before any computation.

    Args:
      mode: "none" (this process alone), "auto" (a cluster that JAX detects: SLURM, Open MPI,
        Kubernetes) or "manual" (the next three arguments).
      coordinator: HOST:PORT of process 0.
      local_device_ids: devices of this process, separated by commas; None: all of the host.
      timeout: seconds until the process prints one line and exits, if others are missing.

    Raises:
      DistributedError: arguments that do not fit together, or no cluster.
    """
    manual = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if mode != "manual":
        if unused := [name for name, value in manual.items() if value is not None]:
            raise DistributedError(f"--{unused[0]} goes with --distributed=manual")
    elif missing := [name for name, value in manual.items() if value is None]:
        raise DistributedError(f"--distributed=manual needs --{missing[0]} too")
    devices = None
    if local_device_ids is not None:
        if mode == "none":
            raise DistributedError("--local_device_ids goes with --distributed=auto or manual")
        devices = local_device_ids.split(",")
        if not all(device.isdecimal() for device in devices):
            raise DistributedError(
                f"--local_device_ids is a list such as 0,1, not {local_device_ids!r}"
            )
        devices = [int(device) for device in devices]
    if mode == "none":
        return
    if mode == "manual":
        _check_manual(coordinator, num_processes, process_id)

    def give_up() -> None:
        reason = _diagnosis(timeout, coordinator, num_processes, process_id)
        print(f"{_program()}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)  # The main thread is inside C++ and cannot be interrupted.

    watchdog = threading.Timer(timeout, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        # JAX's own time limit aborts the process with a C++ stack trace, so it is later.
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=devices,
            initialization_timeout=timeout + 60,
        )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DistributedError(f"the processes of the run cannot be joined: {reason}") from error
    finally:
        watchdog.cancel()
    threading.Thread(target=_end_with_others, daemon=True).start()


def _check_manual(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise DistributedError(f"--coordinator is HOST:PORT, not {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise DistributedError(
            f"--process_id={process_id} is not one of 0 to {num_processes - 1}"
            f" (--num_processes={num_processes})"
        )
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise DistributedError(f"--coordinator={coordinator}: {error.strerror}") from error
    if process_id == 0:
        with socket.socket() as probe:
            # As the coordinator binds it: a port in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise DistributedError(
                    f"port {port} of --coordinator={coordinator} is taken here: {error.strerror}"
                ) from error


def _diagnosis(
    timeout: int, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> str:
    if coordinator is None:
        return f"the processes of the cluster did not find each other within {timeout} s"
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        if process_id != 0:
            return f"process 0 does not answer on --coordinator={coordinator}: {error}"
    return (
        f"not all {num_processes} processes connected to {coordinator} within {timeout} s; each"
        " needs its own --process_id and the same --coordinator and --num_processes"
    )


def _program() -> str:
    return Path(sys.argv[0]).stem


def is_main() -> bool:
    """Whether this is process 0, which writes logs and results."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_main(value: np.typing.ArrayLike) -> np.ndarray:
    """The value of process 0, in all processes; all of them call it."""
    if jax.process_count() == 1:
        return np.asarray(value)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def end_together(error: Exception) -> None:
    """Ends all processes of a run after an error of this one, for which the others would wait."""
    if jax.process_count() == 1:
        return
    _ending.set()
    # The first error of a run stays; without a service, JAX ends the other processes.
    with contextlib.suppress(Exception):
        message = f"{error} (process {jax.process_index()})"
        global_state.client.key_value_set(_FAILURE_KEY, message)
    print(f"\n{_program()}: {error}", file=sys.stderr, flush=True)
    if is_main():
        time.sleep(2 * _FAILURE_POLL)  # It serves the message to the others.
    os._exit(getattr(error, "status", 1))  # Threads of a save may wait for the others.


def _end_with_others() -> None:
    while not _ending.is_set():
        time.sleep(_FAILURE_POLL)
        try:
            message = global_state.client.key_value_try_get(_FAILURE_KEY)
        except Exception:  # There is no such message.
            continue
        if not _ending.is_set():
            print(f"\n{_program()}: {message}", file=sys.stderr, flush=True)
            os._exit(1)


@contextlib.contextmanager
def failing_together(kind: type[UserError]) -> Iterator[None]:
    """Raises an error of `kind` in all processes if the block raises one in any of them.

    Otherwise a process that continues waits for the one that failed. All processes call it.
    """
    failure = None
    try:
        yield
    except kind as error:
        failure = error
    if jax.process_count() > 1:
        own = (str(failure) if failure else "").encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES)
        rows = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
        for process, row in enumerate(rows):
            message = row.tobytes().decode(errors="replace").rstrip()
            failure = failure or (kind(f"{message} (process {process})") if message else None)
    if failure is not None:
        raise failure


class StopPoll:
    """Agrees across processes on the step after which to stop.

    Each poll synchronises all processes, so it runs about every `seconds`, which is also the delay
    of a stop. The interval in steps is estimated from the slowest process and is the same in all of
    them. `pending` says whether a stop is pending in this process.
    """

    def __init__(self, pending: Callable[[], bool], *, seconds: float = 5.0):
        self._pending, self._seconds = pending, seconds
        self._last_step: int | None = None
        self._last_time = time.monotonic()
        self._next_step = 0

    def now(self) -> bool:
        """Whether a stop is pending in any process; all processes call it at the same time."""
        if jax.process_count() == 1:
            return self._pending()
        return bool(multihost_utils.process_allgather(np.array(self._pending())).any())

    def __call__(self, step: int) -> bool:
        """Whether to stop after `step`; all processes call it after every step."""
        if jax.process_count() == 1:
            return self._pending()
        if step < self._next_step:
            return False
        now = time.monotonic()
        steps = 1 if self._last_step is None else max(step - self._last_step, 1)
        own = np.array([self._pending(), (now - self._last_time) / steps], np.float32)
        pending, step_seconds = multihost_utils.process_allgather(own).T
        self._last_step, self._last_time = step, now
        # At most doubled: steps may become slower than the past ones.
        interval = int(self._seconds / max(float(step_seconds.max()), 1e-3))
        self._next_step = step + min(max(1, interval), 2 * steps)
        return bool(pending.any())
