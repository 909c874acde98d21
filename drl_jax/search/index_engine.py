"""What reads and encodes the videos of an update: this process and its workers, or a cluster.

`ray_index.py` has the engine of a cluster.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from drl_jax.models.interactions import Features
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes
from drl_jax.search.encoding import WindowEncoder
from drl_jax.search.reading import VideoRead, read_video

# Videos that a worker may read ahead; a long one waits in a file as large as its frames.
AHEAD = 2


class FramesLostError(Exception):
    """Frames that were read are gone before they were encoded; they must be read again."""


class Encoded(Protocol):
    """Features of a batch of videos, which may still be computed."""

    def is_done(self) -> bool:
        """Whether `result` returns at once."""

    def result(self) -> Features:
        """Waits for the features of all windows, in order.

        Raises:
          FramesLostError: see there.
        """


class IndexEngine(Protocol):
    """Reads and encodes videos."""

    def read(
        self, calls: Sequence[tuple], allowed: Sequence[float]
    ) -> Iterator[VideoRead | WorkerFailure]:
        """Calls `read_video`.

        Args:
          calls: the arguments.
          allowed: seconds of each call.

        Yields:
          The results in order. `frames` may be a reference for `encode`.
        """

    def encode(self, reads: Sequence[VideoRead]) -> Encoded:
        """Starts to encode all windows of a batch."""

    def batches(self) -> int:
        """Batches that may be encoded while an earlier one is not stored."""


class LocalEngine:
    """Worker processes read, and this process encodes."""

    def __init__(self, encoder: WindowEncoder):
        """Starts nothing."""
        self._encoder = encoder

    def read(
        self, calls: Sequence[tuple], allowed: Sequence[float]
    ) -> Iterator[VideoRead | WorkerFailure]:
        return map_in_processes(read_video, calls, timeout=allowed, ahead=AHEAD)

    def encode(self, reads: Sequence[VideoRead]) -> Encoded:
        return _Finished(self._encoder.encode(reads))

    def batches(self) -> int:
        return 0


class _Finished:
    def __init__(self, features: Features):
        self._features = features

    def is_done(self) -> bool:
        return True

    def result(self) -> Features:
        return self._features
