"""Looks at processes, and kills them."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def status(pid: int) -> tuple[str, int] | None:
    """State and parent of a process; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[1])


def children_of(pid: int) -> list[int]:
    running = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [child for child in running if (status(child) or ("", 0))[1] == pid]


def is_running(pid: int) -> bool:
    found = status(pid)
    return found is not None and found[0] != "Z"


def wait_until(
    condition: Callable[[], object],
    process: subprocess.Popen | None = None,
    seconds: float = 300,
) -> None:
    """Waits for something that a process does, which has not ended then."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


@contextlib.contextmanager
def killing_workers(most: int = 1000) -> Iterator[None]:
    """Kills the first `most` worker processes that this process starts, as the kernel does."""
    killed, has_ended = [], threading.Event()

    def kill() -> None:
        while len(killed) < most and not has_ended.wait(0.01):
            for pid in set(children_of(os.getpid())) - set(killed):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if b"_serve_calls" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
