"""Builds the graph of a collection: python -m drl_jax.search.edge_graph DIRECTORY.

In a process of its own, because Qdrant holds Python's interpreter meanwhile, which takes minutes.
"""

import ctypes
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from drl_jax.runtime.errors import UserError

_PR_SET_PDEATHSIG = 1


def build_graph(directory: Path) -> None:
    """Builds the graph of a collection that is closed, and shows the time it takes.

    Raises:
      UserError: it fails; the collection is as before.
    """
    command = [sys.executable, "-m", __name__, str(directory)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        with tqdm(
            desc="building the graph", bar_format="{desc}: {elapsed}", mininterval=1
        ) as progress:
            while process.poll() is None:
                time.sleep(0.05)
                progress.update()
    finally:
        # Also after Ctrl-C.
        process.kill()
        _, message = process.communicate()
    if process.returncode:
        lines = message.strip().splitlines() or [f"exit status {process.returncode}"]
        raise UserError(f"Qdrant in {directory}: the graph cannot be built ({lines[-1]})")


if __name__ == "__main__":
    # Ends with the process that started it, also if that is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    import qdrant_edge

    # What a process that was killed has left.
    shutil.rmtree(Path(sys.argv[1]) / "temp_segments", ignore_errors=True)
    shard = qdrant_edge.EdgeShard.load(sys.argv[1])
    shard.optimize()
    shard.close()
