"""What calls of a worker pool do. Workers import this module, so its imports are light."""

import errno
import os
import signal
import threading
import time
from pathlib import Path

from drl_jax.runtime.errors import Unavailable


def fail(number: int) -> None:
    """Dies for 3; hangs for 5, also if it is asked to end."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 5:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        time.sleep(600)


def work(number: int) -> int:
    """Fails for 3 and 5, raises for 7, 8 and 10 to 13, returns nonsense for 9."""
    fail(number)
    if number == 7:
        raise UnicodeDecodeError("utf-8", b"Caf\xe9", 3, 4, "unexpected\nend " + "of data " * 100)
    if number == 8:
        raise Unpicklable(number, 3)
    if number == 9:
        return threading.Lock()  # A result that cannot be sent.
    if number >= 10:
        raise _RAISED[number]
    return number


_RAISED = {
    10: OSError(errno.EIO, "Input/output error", "a.mp4"),
    11: MemoryError(),
    12: Unavailable("a.mp4", OSError(errno.EMFILE, "Too many open files")),
    13: OSError("image file is truncated"),
}


class Unpicklable(Exception):
    """An exception that can be sent to another process, but not be received there."""

    def __init__(self, number: int, other: int):
        super().__init__(f"about {number} and {other}")


def fail_once(number: int, folder: Path) -> int:
    """Notes when it runs; the first time, it is killed for 2, raises for 3 and hangs for 4."""
    start, mark = time.monotonic(), folder / f"{number}"
    if not mark.exists():
        mark.touch()
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 3:
            raise OSError(errno.EMFILE, "Too many open files")
        if number == 4:
            time.sleep(600)
    time.sleep(0.1)
    mark.write_text(f"{start} {time.monotonic()}")
    return number
