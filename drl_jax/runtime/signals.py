"""Handles SIGINT and SIGTERM at the next safe point of a long job."""

import signal
import sys
from types import FrameType


class StopRequest:
    """Context manager: the first SIGINT or SIGTERM sets `pending`; a second SIGINT interrupts."""

    def __init__(self) -> None:
        self.pending = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
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
        print(
            f"\n{signal.Signals(number).name}: saving a checkpoint, then stopping"
            " (Ctrl-C again stops at once)",
            file=sys.stderr,
        )
