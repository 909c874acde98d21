"""Handles signals that ask a long job to stop, at its next safe point."""

import os
import signal
import sys
from types import FrameType

# SIGHUP comes when a terminal or an SSH connection is closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Context manager: the first SIGINT, SIGTERM or SIGHUP sets `pending`.

    A second SIGINT interrupts. A signal that the process was started to ignore, as `nohup` does
    with SIGHUP, stays ignored.
    """

    def __init__(self) -> None:
        self.pending = False
        self._previous: dict[int, object] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> "StopRequest":
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.pending and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.pending = True
        if number == signal.SIGHUP:
            self._leave_terminal()
        print(
            f"\n{signal.Signals(number).name}: stopping after the next checkpoint or test"
            " (Ctrl-C again stops at once)",
            file=sys.stderr,
        )

    def _leave_terminal(self) -> None:
        """Printing to a terminal that was closed is an error, which would end the job."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nothing, descriptor)
        os.close(nothing)
