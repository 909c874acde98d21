"""Runs commands as a user does: in a process, or in this one where only the messages matter."""

import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Flags that make `configs/shapes.py:smoke` a matter of seconds.
TINY = (
    "--config.model.init=",
    "--config.model.backbone.embed_dim=32",
    "--config.model.backbone.text_width=16",
    "--config.model.backbone.text_heads=2",
    "--config.model.backbone.text_layers=1",
    "--config.model.backbone.vision_width=32",
    "--config.model.backbone.vision_heads=2",
    "--config.model.backbone.vision_layers=1",
    "--config.model.temporal_layers=1",
    # They take longer than such an evaluation.
    "--config.train.pictures=False",
)


def run_module(
    module: str, *arguments: str, check: bool = True, env: dict[str, str] | None = None, **kwargs
) -> subprocess.CompletedProcess:
    """Runs `python -m module` from the root of the repository, on one device."""
    finished = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=kwargs.pop("cwd", ROOT),
        env={**os.environ, **(env or {})},
        timeout=600,
        **kwargs,
    )
    if check and finished.returncode:
        raise AssertionError(f"{module} {arguments}: {finished.stdout}\n{finished.stderr}")
    return finished


def start_module(
    module: str, *arguments: str, prefix: Sequence[str] = (), env: dict[str, str] | None = None
) -> subprocess.Popen:
    """Starts the same in the background, with the command `prefix` before it."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen) -> tuple[str, str]:
    """What a process printed on stdout and stderr until it ended."""
    try:
        return process.communicate(timeout=300)
    finally:
        process.kill()


def start_interruptible(command: list[str], **options) -> subprocess.Popen:
    """Starts a command that SIGINT interrupts, from the root of the repository."""
    # Where the tests run in the background, a shell has them ignore SIGINT.
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, cwd=ROOT, text=True, **options)
    finally:
        signal.signal(signal.SIGINT, previous)


def error_line(finished: subprocess.CompletedProcess) -> str:
    """The one line that a failed command prints on stderr, besides progress bars and notices."""
    assert finished.returncode != 0, finished.stdout
    return _only_line(finished.stderr)


def error_of(module: str, *arguments: str, capsys) -> str:
    """The same for a command that runs in this process, on its 8 devices: `main([...])`."""
    capsys.readouterr()
    is_package = module in ("drl_jax.search", "drl_jax.embed", "drl_jax.weights")
    name = f"{module}.__main__" if is_package else module
    try:
        status = importlib.import_module(name).main(list(arguments))
    except SystemExit as error:  # argparse
        status = error.code
    captured = capsys.readouterr()
    assert status in (1, 2), (status, captured.out)
    return _only_line(captured.err)


def _only_line(errors: str) -> str:
    assert "Traceback" not in errors, errors
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if not re.search(r"\| \d+/\d+ \[| captions cut to ", line)]
    assert len(lines) == 1, errors
    return lines[0]
