"""Ray clusters of several raylets on this machine, and calls that run on them.

Workers import this module, so its imports are light.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.commands import ROOT

# Of raylets and of commands. Without a token: Ray writes that of a local cluster to the home
# directory. Eight devices, as this process has them: features are those of a local run.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # By default they yield to every other process of the machine.
    "RAY_worker_niceness": "0",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
}


@contextlib.contextmanager
def two_nodes() -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` of two nodes of one processor each."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def add_node(cluster: Any, **environment: str) -> Any:
    """Starts a raylet; `environment` is added to that of its workers."""
    settings = {"num_cpus": 1, "object_store_memory": 80 << 20}
    if environment:
        settings["env_vars"] = environment
    return cluster.add_node(**settings)


def kill_node(cluster: Any) -> None:
    """Kills the second node: SIGKILL to its raylet, with which its workers die."""
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)


def workers_of(node: Any) -> list[int]:
    """Process ids of the children of a raylet."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == raylet:
                found.append(int(path.parent.name))
    return found


# ------------------------------------------------------------------- what calls do on the cluster


def work(number: int, folder: Path) -> int:
    """Kills its Ray worker for 2, and for 4 the first time; dies for 3, hangs for 5, raises for 7.

    Its parent is the Ray worker.
    """
    if number == 2 or (number == 4 and not (folder / "killed").exists()):
        (folder / "killed").touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 5:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        time.sleep(600)
    if number == 7:
        raise ValueError("of call 7")
    return number


def sleep_briefly(number: int, folder: Path) -> int:
    """Says that it runs, and takes a moment."""
    (folder / f"{number}").touch()
    time.sleep(0.3)
    return number
