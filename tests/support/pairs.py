"""Trainings of two real processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from support.commands import ROOT


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
        subprocess.Popen(
            [
                *(prefix_of_second if process else ()),
                *(sys.executable, "-m", "drl_jax.train", *arguments, *flags),
                f"--process_id={process}",
                "--init_timeout=120",
            ],
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]


def wait_for(process: subprocess.Popen) -> tuple[str, str]:
    """What a process printed on stdout and stderr until it ended."""
    try:
        return process.communicate(timeout=300)
    finally:
        process.kill()
