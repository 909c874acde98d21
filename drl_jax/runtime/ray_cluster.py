"""Calls on a Ray cluster: the connection, a check of its nodes, and an ordered map.

A call runs in a child process of its Ray worker: a call that hangs or crashes loses the child, with
the limits and messages of the local pool. Ray's own retries are off: it does not tell a node that
died from a file that kills every worker which reads it, and repeats tasks that ran out of memory
for ever.
"""

import contextlib
import importlib.metadata
import logging
import math
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray._private.services import canonicalize_bootstrap_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from drl_jax.runtime import node_check
from drl_jax.runtime.errors import ClusterError, one_line
from drl_jax.runtime.node_check import Needs, problem_of_node
from drl_jax.runtime.resources import available_cpus
from drl_jax.runtime.worker_pool import CallPool, WorkerFailure, limits_of

T = TypeVar("T")

# Seconds until a host accepts a connection, until a node answers the check (its first worker
# process has to start), and between two looks at the nodes.
_CONNECT_TIMEOUT, _CHECK_TIMEOUT, _REFRESH = 10.0, 120.0, 1.0
# Results that are looked at together, and seconds to wait for them.
_AT_ONCE, _WAIT = 64, 0.05
# Start of the names of files that show whether nodes share a directory.
_TOKEN = ".node_check_"
# What the death of a node may do to a call or its result.
_NODE_LOST = (
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.LocalRayletDiedError,
)
_WORKER_LOST = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
# What a client of HTTP/2 sends first, and the type of the frame that the server answers with.
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_SETTINGS = bytes([4])


class RayCluster:
    """A connection to a Ray cluster; a context manager that ends it, and a `local` cluster."""

    def __init__(self, address: str):
        """Connects, and prints the size of the cluster.

        The address "local" starts Ray on this machine, "auto" is the cluster that this machine is a
        node of, and HOST:PORT names its head.

        Raises:
          ClusterError: no cluster is there, or it has another version of Ray or Python.
        """
        _connect(address)
        self._needs: ray.ObjectRef | None = None
        self._tokens: list[Path] = []
        self._nodes: dict[str, dict[str, Any]] = {}
        self._refreshed_at = -math.inf
        print(f"Ray cluster: {len(self.nodes())} nodes, {self._cpus()} CPUs", flush=True)

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *exception: object) -> None:
        for token in self._tokens:
            _delete(token.parent, f"{token.name}*")
        ray.shutdown()

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes that are alive, by id, as rows of `ray.nodes()`."""
        if time.monotonic() - self._refreshed_at > _REFRESH:
            self._nodes, self._refreshed_at = _alive(), time.monotonic()
        return self._nodes

    def _cpus(self) -> int:
        return int(sum(node["Resources"].get("CPU", 0) for node in self.nodes().values()))

    def check(
        self,
        written: Mapping[str, Path],
        example: Path,
        packages: Sequence[str],
        modules: Sequence[str],
    ) -> None:
        """Checks that every node has the versions and sees the files of this process.

        Nodes that join later are checked by each of their workers, before its first call.

        Args:
          written: directories that nodes write, by the flag that names them; created if absent.
          example: a file that nodes read.
          packages: distributions on whose versions results depend.
          modules: packages of this project that nodes use.

        Raises:
          ClusterError: a node cannot do the work; the line names it and says what to do.
          OSError: a directory cannot be written from here.
        """
        tokens = []
        for flag, path in written.items():
            directory = Path(os.path.abspath(path))  # noqa: PTH100 resolve() would follow links
            directory.mkdir(parents=True, exist_ok=True)
            _delete(directory, f"{_TOKEN}*")  # Of a command that was killed.
            self._tokens.append(directory / f"{_TOKEN}{uuid.uuid4().hex}")
            self._tokens[-1].touch()
            tokens.append((flag, str(self._tokens[-1])))
        seen = None
        if example.exists():
            seen = (os.path.abspath(example), example.stat().st_size)  # noqa: PTH100
        needs = Needs(
            packages={name: importlib.metadata.version(name) for name in packages},
            modules={name: node_check.identity(name) for name in modules},
            tokens=tokens,
            example=seen,
        )
        nodes = self.nodes()
        for key, problem in _ask(needs, nodes).items():
            if problem:
                raise ClusterError(f"{_name_of(nodes[key])} {problem}")
            for flag, token in tokens:
                mark = Path(f"{token}.{key[:8]}")
                if not mark.exists():
                    raise ClusterError(
                        f"{_name_of(nodes[key])} writes to another {flag}, {mark.parent}; mount the"
                        " same file system there"
                    )
                mark.unlink()
        self._needs = ray.put(needs)

    def map(
        self,
        function: Callable[..., T],
        arguments: Sequence[tuple],
        *,
        timeout: float | Sequence[float] | None = None,
        ahead: int = 8,
    ) -> Iterator[T | WorkerFailure]:
        """Yields `function(*a)` for each `a` of `arguments`, in order, from the cluster.

        As `map_in_processes`, after `check`, with these differences: an OSError that a call returns
        names the node; a call is repeated beside others, and as often as its node dies; `ahead` is
        per processor of the cluster.

        Raises:
          ClusterError: a node that has joined cannot do the work, or Ray failed.
        """
        limits = limits_of(timeout, arguments)
        remote = ray.remote(_run).options(num_cpus=1, max_retries=0)
        running: dict[ray.ObjectRef, int] = {}
        results: dict[int, Any] = {}
        repeated: set[int] = set()

        def start(call: int) -> None:
            running[remote.remote(function, arguments[call], limits[call], self._needs)] = call

        def collect() -> None:
            count = min(len(running), _AT_ONCE)
            for ref in ray.wait(list(running), num_returns=count, timeout=_WAIT)[0]:
                call = running.pop(ref)
                try:
                    result = ray.get(ref)
                except _NODE_LOST:
                    start(call)
                    continue
                except _WORKER_LOST:
                    result = WorkerFailure("the Ray worker that worked on it died", is_passing=True)
                is_passing = isinstance(result, WorkerFailure) and result.is_passing
                if is_passing and call not in repeated:
                    repeated.add(call)
                    start(call)
                else:
                    results[call] = result

        started, waits = 0, False
        try:
            for turn in range(len(arguments)):
                while True:
                    end = min(turn + 1 + ahead * max(1, self._cpus()), len(arguments))
                    for call in range(started, end):
                        start(call)
                    started = max(started, end)
                    if turn in results:
                        break
                    if not (self._cpus() or waits):
                        print("no node of the cluster has a processor; waiting for one to join")
                        waits = True
                    with _errors_of_ray():
                        collect()
                yield results.pop(turn)
        finally:
            # A generator may end after the connection; Ray would start again.
            for ref in running if ray.is_initialized() else ():
                ray.cancel(ref, force=True)


def _ask(needs: Needs, nodes: Mapping[str, Any]) -> dict[str, str]:
    """What each node lacks, by id; nodes that have left are absent."""
    # By value: a node may lack this package.
    ray.cloudpickle.register_pickle_by_value(node_check)
    try:
        asked = {}
        for key in nodes:
            at_node = NodeAffinitySchedulingStrategy(key, soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": at_node}
            remote = ray.remote(problem_of_node).options(**options)
            asked[key] = remote.remote(needs, f".{key[:8]}")
    finally:
        ray.cloudpickle.unregister_pickle_by_value(node_check)
    end, problems = time.monotonic() + _CHECK_TIMEOUT, {}
    for key, ref in asked.items():
        try:
            problems[key] = ray.get(ref, timeout=max(0.0, end - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            problems[key] = f"has not answered in {_CHECK_TIMEOUT:g} s; restart Ray there"
        except ray.exceptions.RayTaskError as error:
            problems[key] = f"cannot run a check ({one_line(error.cause)})"
        except ray.exceptions.RayError as error:
            if key in _alive():
                problems[key] = f"cannot run a check ({one_line(error)}); restart Ray there"
    return problems


def _alive() -> dict[str, dict[str, Any]]:
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _name_of(node: Mapping[str, Any]) -> str:
    """The name of a node, a row of `ray.nodes()`, in messages."""
    address, key = node["NodeManagerAddress"], node["NodeID"]
    return f"node {node['NodeManagerHostname']} ({address}, {key[:8]})"


def _delete(directory: Path, pattern: str) -> None:
    with contextlib.suppress(OSError):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _errors_of_ray() -> Iterator[None]:
    """An error of Ray, or of a call that could not start, becomes one line."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ClusterError):
            raise ClusterError(str(error.cause)) from error
        # Its attribute `ip` is hidden by the class of the cause.
        address = re.search(r"\bip=([^\s,)]+)|$", str(error))[1]
        raise ClusterError(f"node {address}: {one_line(error.cause)}") from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"Ray failed ({one_line(error)}); rerun the command") from error


# ---------------------------------------------------------------- in a Ray worker

# The child process of this worker; started by the first call.
_pool: CallPool | None = None


def _own_name() -> str:
    """The name of this worker's node, as `_name_of` has it."""
    node = ray.get_runtime_context().get_node_id()
    return f"node {socket.gethostname()} ({ray.util.get_node_ip_address()}, {node[:8]})"


def _run(function: Callable, arguments: tuple, timeout: float | None, needs: Needs) -> Any:
    global _pool
    if _pool is None:
        # The node may have joined after the others were checked.
        if problem := problem_of_node(needs):
            raise ClusterError(f"{_own_name()} {problem}")
        _pool = CallPool(1)
    result = _pool.call(function, *arguments, timeout=timeout)
    if isinstance(result, OSError):
        result = OSError(result.errno, f"{result.strerror} on {_own_name()}", result.filename)
    return result


# ---------------------------------------------------------------- connection


def _connect(address: str) -> None:
    """Starts or joins a cluster, and keeps Ray's own messages off the terminal."""
    # It prints the last lines of the logs of workers that die; `map` says what follows from it.
    ray._private.worker._worker_logs_enabled = False
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == "local":
        settings |= {"num_cpus": available_cpus(), "include_dashboard": False}
    else:
        _check_listening(address)
    try:
        with _quiet_stderr():
            ray.init(address=address, **settings)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise ClusterError(
            f"--ray={address}: the cluster does not let this command in ({one_line(error)}); if it"
            " was started with a token, set RAY_AUTH_MODE=token, and check the port"
        ) from error
    except (RuntimeError, ValueError, OSError) as error:
        message = " ".join(str(error).split())
        remedy = "this machine must be a node of the cluster: `ray start --address=HOST:PORT`"
        if "Version mismatch" in message:
            remedy = "install the same versions of Ray and Python on all nodes and this machine"
        raise ClusterError(f"--ray={address}: {message}; {remedy}") from error
    if threading.current_thread() is threading.main_thread():
        # Ray's handler prints the stack, and ends the process with status 1, as after an error.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check_listening(address: str) -> None:
    """Checks that a gRPC server is there: Ray itself would try for minutes."""
    found = address
    try:
        if address == "auto":
            found = canonicalize_bootstrap_address("auto")
    except ConnectionError as error:
        raise _no_cluster(address, "no node of one runs on this machine") from error
    host, _, port = found.rpartition(":")
    if not host or not port.isdecimal() or "/" in found:
        raise ClusterError(
            f"--ray={address}: write local, auto, or HOST:PORT of the head of a Ray cluster"
        )
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT) as connection:
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", "") or str(error)
        raise _no_cluster(address, f"{found}: {reason}") from error
    if answer[3:4] != _HTTP2_SETTINGS:
        raise _no_cluster(address, f"{found} is the port of another server")


def _no_cluster(address: str, reason: str) -> ClusterError:
    return ClusterError(
        f"--ray={address}: no Ray cluster is there ({reason}); start one with `ray start --head`,"
        " and join it with `ray start --address=HOST:PORT` on the other nodes"
    )


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Ray's C++ part writes to the file descriptor."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
