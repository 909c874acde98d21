"""What the wall time of a run is spent on."""

import time


class WallTime:
    """Divides the time since it was created between activities.

    Attributes:
      seconds: seconds by activity, in the order of their first use.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._until = time.monotonic()

    def spent_on(self, activity: str) -> None:
        """Counts the time since the last call as spent on an activity."""
        now = time.monotonic()
        self.seconds[activity] = self.seconds.get(activity, 0.0) + now - self._until
        self._until = now

    def __str__(self) -> str:
        """One line, the longest activity first; those below 0.5 % are left out."""
        total = sum(self.seconds.values()) or 1.0
        shares = sorted(self.seconds.items(), key=lambda item: -item[1])
        parts = [f"{name} {100 * s / total:.0f} %" for name, s in shares if s / total >= 0.005]
        return f"{total:.0f} s: {', '.join(parts)}"
