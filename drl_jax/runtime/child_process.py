"""Runs a module in a process that ends with this one, also if this one is killed.

python -m drl_jax.runtime.child_process PARENT MODULE [ARGUMENT ...]
"""

import os
import runpy
import subprocess
import sys
import threading
import time


def run_module(module: str, *arguments: str) -> int:
    """Runs `python -m MODULE ARGUMENT ...` and returns its exit status."""
    child = [sys.executable, "-m", __name__, str(os.getpid()), module, *arguments]
    return subprocess.run(child).returncode


def exit_with_parent(parent: int) -> None:
    """Ends this process when its parent has ended: a process that is killed cannot end others."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    exit_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
