"""Handles signals that ask a command to end: at once, or at the next safe point of a long job."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

# Seconds after an interruption in which further ones are the same impatience.
_PATIENCE = 1.0
# Exit status of a command that was interrupted.
_INTERRUPTED = 128 + signal.SIGINT


class Interruption:
    """Context manager: SIGINT interrupts the block once, and never the cleaning up after it.

    The first SIGINT raises KeyboardInterrupt, after the import that is running: extension modules
    print or drop what is raised in one. Those of the next second do nothing; a later one prints
    `line` and ends the process with status 130, also if not everything is cleaned up. This holds
    until the process ends. In a thread other than the main one, and where SIGINT is ignored or
    handled already, nothing changes.
    """

    def __init__(self, line: str):
        self._line = line
        self._since = 0.0
        # Whether there was a SIGINT.
        self.came = False
        self._is_inside = self._is_raised = self._is_end = False

    def __enter__(self) -> "Interruption":
        is_main = threading.current_thread() is threading.main_thread()
        self._is_inside = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._is_inside:
            signal.signal(signal.SIGINT, self._on_signal)
            # Before those of libraries are registered: it runs after them.
            atexit.register(self._at_exit)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_inside:
            self._is_inside = False
            if not self.came:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def end(self) -> int:
        """The exit status, which stands whatever happens at the end of the process."""
        self._is_end = self.came
        return _INTERRUPTED

    def _at_exit(self) -> None:
        # Python's last steps reset handlers, and a SIGINT would then change the exit status.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._is_end:
            # XLA may crash there with what the interruption left unfinished.
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(_INTERRUPTED)

    def raise_again(self) -> None:
        """Raises KeyboardInterrupt once more: Python dropped one that came in a callback."""
        self._is_raised = False
        self._retry()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.came:
            self.came, self._since = True, time.monotonic()
        is_late = time.monotonic() - self._since > _PATIENCE
        if self._is_inside and not self._is_raised:
            if not _is_importing(frame):
                self._is_raised = True
                raise KeyboardInterrupt
            if not is_late:
                self._retry()
        if is_late:
            _write("" if self._is_end else f"{self._line}\n")
            os._exit(_INTERRUPTED)

    def _retry(self) -> None:
        """Sends the signal again, soon, so that it also ends a system call."""
        if self._is_inside:
            main = threading.main_thread().ident
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()


class StopRequest:
    """Context manager: the first SIGINT, SIGTERM or SIGHUP sets `pending`.

    SIGHUP comes when a terminal or an SSH connection is closed. A second SIGINT interrupts. A
    signal that the process was started to ignore, as `nohup` does with SIGHUP, stays ignored.
    """

    def __init__(self) -> None:
        self.pending = False
        self._previous: dict[int, Any] = {}
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.pending and number == signal.SIGINT:
            # Raises KeyboardInterrupt, but not while that of an earlier one is cleaned up after.
            self._previous[number](number, frame)
            return
        self.pending = True
        if number == signal.SIGHUP:
            # Printing to a terminal that was closed is an error, which would end the job.
            nothing = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self._terminals:
                os.dup2(nothing, descriptor)
            os.close(nothing)
        _write(
            f"\n{signal.Signals(number).name}: stopping after the next checkpoint or test"
            " (Ctrl-C again stops at once)\n"
        )


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


def _write(text: str) -> None:
    """Writes to stderr, where `print` is an error if the signal came during another one."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
