"""Trainings of two real processes."""

import socket
import subprocess
from collections.abc import Sequence

from support.commands import start_module


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_pair(
    arguments: Sequence[str], *, prefix_of_second: Sequence[str] = ()
) -> list[subprocess.Popen]:
    """Two processes of two devices each.

    Args:
      arguments: of `drl_jax.train`.
      prefix_of_second: a command that runs the command of process 1.
    """
    port = free_port()
    flags = ("--distributed=manual", f"--coordinator=localhost:{port}", "--num_processes=2")
    return [
        start_module(
            "drl_jax.train",
            *arguments,
            *flags,
            f"--process_id={process}",
            "--init_timeout=120",
            prefix=prefix_of_second if process else (),
            env={"JAX_NUM_CPU_DEVICES": "2"},
        )
        for process in (0, 1)
    ]
