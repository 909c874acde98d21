"""Batches of videos of an update: they are encoded on an engine, and stored in order."""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from drl_jax.models.interactions import Features
from drl_jax.runtime.worker_pool import WorkerFailure
from drl_jax.search.encoding import delete_spooled
from drl_jax.search.index_engine import Encoded, FramesLostError, IndexEngine
from drl_jax.search.reading import VideoRead
from drl_jax.search.rows import IndexedVideo, SearchIndexError
from drl_jax.search.writer import IndexWriter

# Videos wait at most so long for their batch to be full, seconds: a kill loses no more work.
_STORED_EVERY = 15.0

_Batch = list[tuple[IndexedVideo, VideoRead]]


class Batches:
    """Videos that were read and are not stored yet.

    Attributes:
      unavailable: why videos could not be read this time, by path; these are not stored.
    """

    def __init__(
        self,
        engine: IndexEngine,
        writer: IndexWriter,
        windows: int,
        calls_again: Callable[[Sequence[IndexedVideo]], tuple[list[tuple], list[float]]],
    ):
        """Starts empty.

        Args:
          engine: encodes.
          writer: of the index.
          windows: of a batch, at least.
          calls_again: arguments of `IndexEngine.read` for videos whose frames were lost.
        """
        self._engine, self._writer, self._windows = engine, writer, windows
        self._calls_again = calls_again
        self.unavailable: dict[str, str] = {}
        # The next batch and when it got its first video, and batches that are being encoded.
        self._next: _Batch = []
        self._since = time.monotonic()
        self._encoding: collections.deque[tuple[_Batch, Encoded]] = collections.deque()

    def add(self, video: IndexedVideo, read: VideoRead) -> None:
        """Takes a video that was read; encodes and stores what is due.

        Raises:
          SearchIndexError: the index cannot be written.
        """
        if read.is_passing:
            self.unavailable[video.path] = read.error
            return
        if not self._next:
            self._since = time.monotonic()
        self._next.append((video, read))
        waiting = sum(len(read.windows) for _, read in self._next)
        if waiting >= self._windows or time.monotonic() - self._since > _STORED_EVERY:
            self._encode()
        self._store(self._engine.batches())

    def finish(self) -> None:
        """Encodes and stores what is left."""
        self._encode()
        self._store(0)

    def _encode(self) -> None:
        """Starts to encode the next batch."""
        batch, self._next = self._next, []
        if batch:
            self._encoding.append((batch, self._engine.encode([read for _, read in batch])))

    def _store(self, at_most: int) -> None:
        """Stores the batches that are encoded, in order; waits until `at_most` are left."""
        while self._encoding:
            batch, encoded = self._encoding[0]
            if len(self._encoding) <= at_most and not encoded.is_done():
                return
            try:
                features = encoded.result()
            except FramesLostError:
                batch = self._read_again(batch)
                encoded = self._engine.encode([read for _, read in batch])
                self._encoding[0] = (batch, encoded)
                continue
            self._encoding.popleft()
            self._put(batch, features)

    def _read_again(self, batch: _Batch) -> _Batch:
        """Reads the short videos of a batch again; the frames of long ones are in files."""
        lost = [video for video, read in batch if read.frames is not None]
        reads = iter(self._engine.read(*self._calls_again(lost)))
        directory = self._writer.directory
        again = [
            (video, read if read.frames is None else checked(next(reads), directory))
            for video, read in batch
        ]
        self.unavailable |= {video.path: read.error for video, read in again if read.is_passing}
        return [(video, read) for video, read in again if not read.is_passing]

    def _put(self, batch: _Batch, features: Features) -> None:
        """Stores a batch that is encoded."""
        records = [
            dataclasses.replace(
                video,
                allowed=video.allowed if read.timed_out else 0.0,
                sha256=read.sha256,
                error=read.error,
                times=read.times,
                windows=read.windows,
                duration=read.duration,
            )
            for video, read in batch
        ]
        strips = {video.path: list(read.strips) for video, read in batch}
        self._writer.put(records, features, strips)
        delete_spooled([read for _, read in batch])


def checked(read: VideoRead | WorkerFailure, directory: Path) -> VideoRead:
    """What was read of a video, also if its reader failed.

    Args:
      read: a result of `IndexEngine.read`.
      directory: of the index.

    Raises:
      SearchIndexError: the frames of a long video could not be written.
    """
    if isinstance(read, WorkerFailure):
        # A video that took too long is stored with the time that it had.
        is_passing = read.is_passing and not read.timed_out
        return VideoRead("", read.reason, timed_out=read.timed_out, is_passing=is_passing)
    if read.failure:
        raise SearchIndexError(
            f"cannot write to the index {directory} ({read.failure}); fix this, then rerun the"
            " command to continue"
        )
    return read
