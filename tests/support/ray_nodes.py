"""Ray clusters of several raylets on this machine, and calls that run on them.

Workers import this module, so its imports are light.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from support.calls import fail
from support.commands import ROOT

# Of raylets and of commands. Without a token: Ray writes that of a local cluster to the home
# directory. Eight devices, as this process has them: features are those of a local run.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # By default they yield to every other process of the machine.
    "RAY_worker_niceness": "0",
    # A killed node is noticed after 2 s instead of 15; a busy one has 8 s to answer.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
}


class Node(NamedTuple):
    """A node: its id, and the process id of its raylet."""

    id: str
    raylet: int

    def workers(self) -> list[int]:
        """Process ids of the children of the raylet."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[1]) == self.raylet:
                    found.append(int(path.parent.name))
        return found


class Nodes:
    """Ray's own cluster for tests, in a process: starting a raylet forks, and jax has threads.

    Attributes:
      address: of the head.
      head: the first node.
      others: the other nodes.
    """

    def __init__(self) -> None:
        """Starts the head."""
        self._owner = subprocess.Popen(
            [sys.executable, "-m", "support.ray_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        self.address, *head = json.loads(self._owner.stdout.readline())
        self.head, self.others = Node(*head), list[Node]()

    def add(self, **environment: str) -> Node:
        """Starts a node; `environment` is added to that of its workers."""
        self.others.append(Node(*self._ask("add", environment)))
        return self.others[-1]

    def kill(self, node: Node) -> None:
        """SIGKILL to the raylet of a node, with which its workers die."""
        self._ask("kill", node.id)
        self.others.remove(node)

    def close(self) -> None:
        """Ends all nodes."""
        self._owner.communicate()

    def _ask(self, *request: Any) -> Any:
        print(json.dumps(request), file=self._owner.stdin, flush=True)
        return json.loads(self._owner.stdout.readline())


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    """A cluster of two nodes of one processor each, and an environment to connect to it."""
    nodes, before = Nodes(), dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        nodes.add()
        yield nodes
    finally:
        os.environ.clear()
        os.environ.update(before)
        nodes.close()


def _own_nodes() -> None:
    """Does what `Nodes` asks for, until its input ends."""
    from ray.cluster_utils import Cluster

    answers, sys.stdout = sys.stdout, sys.stderr
    settings = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**settings, "include_dashboard": False})

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    def described(node: Any) -> list:
        return [node.node_id, node.all_processes["raylet"][0].process.pid]

    answer([cluster.address, *described(cluster.head_node)])
    for line in sys.stdin:
        what, value = json.loads(line)
        if what == "add":
            extra = {"env_vars": value} if value else {}
            answer(described(cluster.add_node(**settings, **extra)))
        else:
            node = next(node for node in cluster.worker_nodes if node.node_id == value)
            cluster.remove_node(node, allow_graceful=False)
            answer(None)
    cluster.shutdown()


# ------------------------------------------------------------------- what calls do on the cluster


def work(number: int, folder: Path) -> int:
    """Kills its Ray worker for 2, and for 4 the first time; dies for 3, hangs for 5, raises for 7.

    Its parent is the Ray worker.
    """
    if number == 2 or (number == 4 and not (folder / "killed").exists()):
        (folder / "killed").touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    fail(number)
    if number == 7:
        raise ValueError("of call 7")
    return number


def sleep_briefly(number: int, folder: Path) -> int:
    """Says that it runs, and takes a moment."""
    (folder / f"{number}").touch()
    time.sleep(0.3)
    return number


if __name__ == "__main__":
    _own_nodes()
