"""Training over several processes: flags, a bounded start, and what the processes agree on."""

import os
import socket
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from drl_jax.runtime.errors import UserError


class DistributedError(UserError):
    """Flags that name no cluster, or processes that do not find each other."""


def define_flags() -> None:
    """The flags that `initialize_from_flags` reads."""
    flags.DEFINE_enum(
        "distributed",
        "none",
        ["none", "auto", "manual"],
        "Processes of the run. none: this one. auto: those of SLURM, Open MPI or Kubernetes."
        " manual: those of --coordinator, --num_processes and --process_id.",
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT on which process 0 is reached.")
    flags.DEFINE_integer("num_processes", None, "Number of processes.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_list(
        "local_device_ids", None, "Devices of this host that are this process's; default: all."
    )
    flags.DEFINE_integer("init_timeout", 300, "Seconds to wait for the other processes.")


def initialize_from_flags() -> None:
    """Joins the processes of the run; to be called before anything is computed.

    Raises:
      DistributedError: flags that do not fit together, or no cluster to be found.
    """
    given = flags.FLAGS
    manual = {name: given[name].value for name in ("coordinator", "num_processes", "process_id")}
    if given.distributed != "manual":
        if unused := [name for name, value in manual.items() if value is not None]:
            raise DistributedError(f"--{unused[0]} goes with --distributed=manual")
    elif missing := [name for name, value in manual.items() if value is None]:
        raise DistributedError(f"--distributed=manual needs --{missing[0]} too")
    if given.init_timeout <= 0:
        raise DistributedError("--init_timeout must be a positive number of seconds")
    if given.distributed == "none":
        if given.local_device_ids is not None:
            raise DistributedError("--local_device_ids goes with --distributed=auto or manual")
        return
    if given.distributed == "manual":
        _check_manual(**manual)
    _initialize(
        given.init_timeout,
        coordinator_address=manual["coordinator"],
        num_processes=manual["num_processes"],
        process_id=manual["process_id"],
        local_device_ids=_device_ids(given.local_device_ids),
    )


def _check_manual(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise DistributedError(f"--coordinator is HOST:PORT, not {coordinator!r}")
    if num_processes < 1:
        raise DistributedError(f"--num_processes must be positive, not {num_processes}")
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
            # As the coordinator binds it: a port in its last closing minute is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise DistributedError(
                    f"port {port} of --coordinator={coordinator} is taken here: {error.strerror}"
                ) from error


def _device_ids(values: list[str] | None) -> list[int] | None:
    if values is None:
        return None
    if not values or not all(value.isdigit() for value in values):
        raise DistributedError(
            f"--local_device_ids is a list such as 0,1, not {','.join(values)!r}"
        )
    return [int(value) for value in values]


def _initialize(timeout: int, **arguments: object) -> None:
    """`jax.distributed.initialize`, ended by one line when it takes longer than `timeout`.

    Its own time limit aborts the process with a stack trace of C++, so it gets a later one.
    """

    def give_up() -> None:
        print(f"{_program()}: {_diagnosis(timeout, arguments)}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread is inside C++ and cannot be interrupted

    watchdog = threading.Timer(timeout, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(initialization_timeout=timeout + 60, **arguments)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DistributedError(f"the processes of the run cannot be joined: {reason}") from error
    finally:
        watchdog.cancel()


def _diagnosis(timeout: int, arguments: dict) -> str:
    address, own = arguments["coordinator_address"], arguments["process_id"]
    if address is None:
        return f"the processes of the cluster did not find each other within {timeout} s"
    others = (
        f"not all {arguments['num_processes']} processes came to {address} within {timeout} s;"
        " each needs its own --process_id and the same --coordinator and --num_processes"
    )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        if own != 0:
            return f"process 0 does not answer on --coordinator={address}: {error}"
    return others


def _program() -> str:
    return Path(sys.argv[0]).stem


def is_main() -> bool:
    """Whether this process writes logs and results: process 0."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` holds in any process; all of them have to ask at the same time."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
