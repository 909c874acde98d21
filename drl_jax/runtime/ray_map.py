"""Calls on a Ray cluster, whose results come in order.

A call runs in a child process of its Ray worker: a call that hangs or crashes loses the child, with
the limits and messages of the local pool. Ray's own retries are off: it does not tell a node that
died from a file that kills every worker which reads it, and repeats tasks that ran out of memory
for ever.
"""

import collections
import dataclasses
import socket
import sys
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions

from drl_jax.runtime.node_check import Needs, problem_of_node
from drl_jax.runtime.worker_pool import CallPool, WorkerFailure

# Results that are looked at together, and seconds to wait for them.
_AT_ONCE, _WAIT = 64, 0.05
# What the death of a node may do to a call or its result.
_NODE_LOST = (
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.LocalRayletDiedError,
)
_WORKER_LOST = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)


class BadNodeError(Exception):
    """A worker is on a node that cannot do the work."""


@dataclasses.dataclass
class _Call:
    arguments: tuple
    timeout: float | None
    is_repeated: bool = False
    is_done: bool = False
    result: Any = None


class OrderedCalls:
    """Calls of one function that run, or whose results wait for their turn."""

    def __init__(self, function: Callable, needs: ray.ObjectRef):
        """Starts nothing.

        Args:
          function: defined at the top level of a module.
          needs: what workers check before their first call.
        """
        self._function, self._needs = function, needs
        self._remote = ray.remote(_run).options(num_cpus=1, max_retries=0)
        self._waiting: collections.deque[_Call] = collections.deque()
        self._running: dict[ray.ObjectRef, _Call] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, arguments: tuple, timeout: float | None) -> None:
        """Starts a call when a processor is free."""
        call = _Call(arguments, timeout)
        self._waiting.append(call)
        self._start(call)

    def next_results(self) -> list[Any]:
        """The results that are next in order; none if the first call is not done in a moment.

        Raises:
          ray.exceptions.RayError: a call could not be started.
        """
        if self._running and not self._waiting[0].is_done:
            self._collect()
        found = []
        while self._waiting and self._waiting[0].is_done:
            found.append(self._waiting.popleft().result)
        return found

    def cancel(self) -> None:
        """Ends the calls that run."""
        # A generator that is left unfinished may end after the connection; Ray would start again.
        if ray.is_initialized():
            for ref in self._running:
                ray.cancel(ref, force=True)
        self._running.clear()
        self._waiting.clear()

    def _start(self, call: _Call) -> None:
        ref = self._remote.remote(self._function, call.arguments, call.timeout, self._needs)
        self._running[ref] = call

    def _collect(self) -> None:
        refs = list(self._running)
        ready, _ = ray.wait(refs, num_returns=min(len(refs), _AT_ONCE), timeout=_WAIT)
        for ref in ready:
            call = self._running.pop(ref)
            try:
                result = ray.get(ref)
            except _NODE_LOST:
                self._start(call)
                continue
            except _WORKER_LOST:
                result = WorkerFailure("the Ray worker that worked on it died", is_passing=True)
            if isinstance(result, WorkerFailure) and result.is_passing and not call.is_repeated:
                call.is_repeated = True
                self._start(call)
                continue
            call.result, call.is_done = result, True


# ------------------------------------------------------------------------------ in a Ray worker

# The child process of this worker; started by the first call.
_pool: CallPool | None = None


def _node_name() -> str:
    """The name of this worker's node in messages, as in `ray_cluster`."""
    node = ray.get_runtime_context().get_node_id()
    return f"node {socket.gethostname()} ({ray.util.get_node_ip_address()}, {node[:8]})"


def _run(function: Callable, arguments: tuple, timeout: float | None, needs: Needs) -> Any:
    """One call."""
    global _pool
    if _pool is None:
        # The node may have joined after the others were checked.
        if problem := problem_of_node(needs):
            raise BadNodeError(f"{_node_name()} {problem}")
        # A spawned process imports the main module of its parent, and that of a worker all of Ray.
        vars(sys.modules["__main__"]).pop("__file__", None)
        _pool = CallPool(1)
    result = _pool.call(function, *arguments, timeout=timeout)
    if isinstance(result, OSError):
        result = OSError(result.errno, f"{result.strerror} on {_node_name()}", result.filename)
    return result
