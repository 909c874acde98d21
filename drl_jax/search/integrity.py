"""Checks an open index against its checksums.

Row by row, in the order of slots: the row of the table, and the features of its windows. A small
index is checked when it is opened. A large one is checked in the background, and what is shown
meanwhile is checked when it is read.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from drl_jax.models.interactions import Features
from drl_jax.search.rows import IndexedVideo, SearchIndexError, check_features
from drl_jax.search.store import Store
from drl_jax.search.videos import IndexedVideos

# Windows that are checked before an index is open: a few tenths of a second.
_AT_ONCE = 10_000
# Videos that are checked at a time.
_CHUNK = 500


class IndexCheck:
    """The check of one state of an index.

    Attributes:
      checked: slots below this one are checked.
    """

    def __init__(
        self,
        directory: Path,
        videos: IndexedVideos,
        arrays: Features,
        check_files: Callable[[], None],
        *,
        first_slot: int = 0,
    ):
        """Checks a small index, and starts the check of a large one.

        Args:
          directory: of the index.
          videos: that can be searched.
          arrays: stored arrays, one row per slot.
          check_files: raises if the file of an array was cut; reading it would end the process.
          first_slot: slots below this one were checked before.

        Raises:
          SearchIndexError: a small index is damaged.
        """
        self._directory, self._arrays, self._check_files = directory, arrays, check_files
        self._error: SearchIndexError | None = None
        self._stopped = False
        self.checked = first_slot
        self._thread: threading.Thread | None = None
        if videos.windows_from(first_slot) <= _AT_ONCE:
            self._run(videos)
            self.raise_damage()
        else:
            # A daemon: a command that has its answer ends.
            self._thread = threading.Thread(target=self._run, args=(videos,), daemon=True)
            self._thread.start()

    def raise_damage(self) -> None:
        """Raises the damage that was found so far.

        Raises:
          SearchIndexError: the index is damaged.
        """
        if self._error is not None:
            raise self._error

    def check_now(self, videos: Sequence[IndexedVideo]) -> None:
        """Checks the features of some videos if they are not checked yet.

        Raises:
          SearchIndexError: they are damaged.
        """
        check_features(self._directory, videos, self._arrays, first_slot=self.checked)

    def wait(self) -> None:
        """Waits until all is checked.

        Raises:
          SearchIndexError: the index is damaged.
        """
        if self._thread is not None:
            self._thread.join()
        self.raise_damage()

    def stop(self) -> None:
        """Ends the check: the state of the index was replaced by another one."""
        self._stopped = True

    def _run(self, videos: IndexedVideos) -> None:
        first_slot = self.checked
        try:
            with Store(self._directory) as store:
                store.check_table()
            for chunk in videos.chunks(_CHUNK, first_slot):
                if self._stopped:
                    return
                self._check_files()
                check_features(self._directory, chunk, self._arrays, first_slot=first_slot)
                self.checked = chunk[-1].slots.stop
        except SearchIndexError as error:
            self._error = error
