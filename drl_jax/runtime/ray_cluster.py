"""A Ray cluster as the engine of a command: connection, checks of its nodes, and a map of calls.

Ray is an extra: `cluster.connect` imports this module. `RayCluster.map` has the interface of
`worker_pool.map_in_processes`, and another engine would be another module with such a map.
"""

import contextlib
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from drl_jax.runtime import node_check
from drl_jax.runtime.cluster import ClusterError
from drl_jax.runtime.errors import one_line
from drl_jax.runtime.node_check import Needs, Token, needs_of_driver, problem_of_node
from drl_jax.runtime.ray_connection import connect_ray
from drl_jax.runtime.ray_map import BadNodeError, OrderedCalls
from drl_jax.runtime.worker_pool import WorkerFailure

T = TypeVar("T")

# Seconds until a node answers the check: its first worker process has to start.
_CHECK_TIMEOUT = 120.0
# Seconds between two looks at the nodes.
_REFRESH = 1.0
# Start of the name of a token's file.
_TOKEN = ".node_check_"


class RayCluster:
    """A connection to a Ray cluster; a context manager that ends it.

    A cluster that the command has started itself (`local`) ends with it, also if it is killed.
    """

    def __init__(self, address: str):
        """Connects, and prints the size of the cluster.

        Args:
          address: "local" starts Ray on this machine; "auto" is the cluster that this machine is a
            node of; otherwise HOST:PORT of the head of this cluster.

        Raises:
          ClusterError: no cluster is there, or it has another version of Ray or Python.
        """
        self.address = address
        connect_ray(address)
        self._needs: ray.ObjectRef | None = None
        self._tokens: list[Path] = []
        self._known: dict[str, str] = {}
        self._nodes: dict[str, dict[str, Any]] = {}
        self._refreshed_at = -math.inf
        # Whether it was printed that there is no processor.
        self._is_waiting = False
        nodes = self.nodes()
        print(f"Ray cluster: {len(nodes)} nodes, {self.cpus():g} CPUs", flush=True)

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for token in self._tokens:
            with contextlib.suppress(OSError):
                for file in token.parent.glob(f"{token.name}*"):
                    file.unlink(missing_ok=True)
        ray.shutdown()

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes that are alive, by id; a node that joins or leaves is printed."""
        if time.monotonic() - self._refreshed_at < _REFRESH:
            return self._nodes
        self._nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        self._refreshed_at = time.monotonic()
        names = {key: _name_of(node) for key, node in self._nodes.items()}
        if self._known:
            for key in self._known.keys() - names.keys():
                tqdm.write(f"{self._known[key]} has left the cluster")
            for key in names.keys() - self._known.keys():
                tqdm.write(f"{names[key]} has joined the cluster")
        self._known = names
        return self._nodes

    def cpus(self) -> float:
        """Processors of all nodes."""
        return sum(node["Resources"].get("CPU", 0) for node in self.nodes().values())

    def check(
        self,
        written: Mapping[str, Path],
        example: Path,
        packages: Sequence[str],
        modules: list[str],
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
        needs = needs_of_driver(list(packages), modules)
        tokens = [self._write_token(flag, path) for flag, path in written.items()]
        size = example.stat().st_size if example.exists() else -1
        seen = (os.path.abspath(example), size) if size >= 0 else None  # noqa: PTH100 links stay
        needs = Needs(needs.python, needs.packages, needs.modules, tuple(tokens), seen)
        marks = {key: f".{key[:8]}" for key in self.nodes()}
        for key, problem in self._problems(needs, marks).items():
            if problem:
                raise ClusterError(f"{self._known.get(key, key)} {problem}")
            for token in tokens:
                written_there = Path(token.path + marks[key])
                if not written_there.exists():
                    raise ClusterError(
                        f"{self._known.get(key, key)} writes to another {token.flag},"
                        f" {written_there.parent}; mount the same file system there"
                    )
                written_there.unlink()
        self._needs = ray.put(needs)

    def map(
        self,
        function: Callable[..., T],
        arguments: Sequence[tuple],
        *,
        timeout: float | Sequence[float] | None = None,
        ahead: int = 8,
    ) -> Iterator[T | WorkerFailure]:
        """Computes `function(*a)` for each `a` of `arguments`, in order, on the cluster.

        As `map_in_processes`, with these differences. An OSError that a call returns names the
        node. A call is repeated beside others, and as often as its node dies. `check` precedes.

        Args:
          function: defined at the top level of a module.
          arguments: one tuple for each call.
          timeout: seconds per call, or of each call.
          ahead: finished or running calls per processor of the cluster that are held at a time.

        Yields:
          The results in order; a call that fails gives a WorkerFailure, and the others continue.

        Raises:
          ClusterError: a node that has joined cannot do the work, or Ray failed.
        """
        timeouts = timeout if isinstance(timeout, Sequence) else [timeout] * len(arguments)
        calls = OrderedCalls(function, self._needs)
        try:
            for call, seconds in zip(arguments, timeouts, strict=True):
                calls.submit(call, seconds)
                while len(calls) > ahead * self._processors():
                    yield from self._reported(calls.next_results)
            while len(calls):
                self._processors()
                yield from self._reported(calls.next_results)
        finally:
            calls.cancel()

    def _processors(self) -> int:
        """At least 1; prints it once if there is none, and the calls wait for a node that joins."""
        cpus = int(self.cpus())
        if not cpus and not self._is_waiting:
            tqdm.write("no node of the cluster has a processor; waiting for one to join")
        self._is_waiting = not cpus
        return max(1, cpus)

    @staticmethod
    def _reported(work: Callable[[], T]) -> T:
        """Calls; an error of Ray, or of a call that could not start, becomes one line."""
        try:
            return work()
        except ray.exceptions.RayTaskError as error:
            raise ClusterError(_problem_of_task(error)) from error
        except ray.exceptions.RayError as error:
            raise ClusterError(f"Ray failed ({one_line(error)}); rerun the command") from error

    def _write_token(self, flag: str, directory: Path) -> Token:
        directory = Path(os.path.abspath(directory))  # noqa: PTH100 resolve() would follow links
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{_TOKEN}*"):  # Of a command that was killed.
            left.unlink(missing_ok=True)
        token = Token(flag, str(directory / f"{_TOKEN}{uuid.uuid4().hex}"), uuid.uuid4().hex)
        self._tokens.append(Path(token.path))
        Path(token.path).write_text(token.content)
        return token

    def _problems(self, needs: Needs, marks: Mapping[str, str]) -> dict[str, str]:
        """Asks every node at once; what it lacks, by its id."""
        # By value: a node may lack this package.
        ray.cloudpickle.register_pickle_by_value(node_check)
        try:
            asked = {}
            for key, mark in marks.items():
                at_node = NodeAffinitySchedulingStrategy(key, soft=False)
                remote = ray.remote(problem_of_node).options(
                    num_cpus=0, max_retries=0, scheduling_strategy=at_node
                )
                asked[key] = remote.remote(needs, mark)
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
                if key in {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
                    problems[key] = f"cannot run a check ({one_line(error)}); restart Ray there"
        return problems


def _name_of(node: Mapping[str, Any]) -> str:
    """The name of a node in messages, from a row of `ray.nodes()`."""
    return (
        f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
    )


def _problem_of_task(error: ray.exceptions.RayTaskError) -> str:
    """One line for an exception of a task, which names the node."""
    if isinstance(error.cause, BadNodeError):
        return str(error.cause)
    # Its attribute `ip` is hidden by the class of the cause.
    found = re.search(r"\bip=([^\s,)]+)", str(error))
    return f"node {found[1] if found else ''}: {one_line(error.cause)}"
