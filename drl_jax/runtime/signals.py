"""Handles signals that ask a long job to stop, at its next safe point."""

import contextlib
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

    def __enter__(self) -> "StopRequest":
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
        # After SIGHUP there may be no terminal to print to.
        with contextlib.suppress(OSError):
            print(
                f"\n{signal.Signals(number).name}: saving a checkpoint, then stopping"
                " (Ctrl-C again stops at once)",
                file=sys.stderr,
            )
