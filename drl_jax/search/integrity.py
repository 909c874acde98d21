"""Checks an open index against its checksums.

Row by row, in the order of slots: the row of the table, and the features of its windows. A small
index is checked when it is opened. A large one is checked in the background, and what is shown
meanwhile is checked when it is read.
"""

import threading
from collections.abc import Sequence

from drl_jax.search.feature_checks import check_features, rows_of_video
from drl_jax.search.joined import check_distinct
from drl_jax.search.part import IndexPart
from drl_jax.search.rows import IndexedVideo, SearchIndexError
from drl_jax.search.slots import by_part
from drl_jax.search.store import Store

# Windows that are checked before an index is open: a few tenths of a second.
_AT_ONCE = 10_000
# Videos that are checked at a time.
_CHUNK = 500


class IndexCheck:
    """The check of one state of an index.

    Attributes:
      checked: for each part of the index, slots of the part below this one are checked.
    """

    def __init__(self, parts: Sequence[IndexPart], previous: "IndexCheck | None" = None):
        """Checks a small index, and starts the check of a large one.

        Args:
          parts: of the index.
          previous: the check of an earlier state of the same parts, which ends; what it has checked
            is not checked again.

        Raises:
          SearchIndexError: a small index is damaged.
        """
        self._parts = parts
        self._error: SearchIndexError | None = None
        self._stopped = False
        self.checked = [0] * len(parts)
        self._is_first = previous is None
        if previous is not None:
            previous.stop()
            for number, part in enumerate(parts):
                if part.header["generation"] == previous._parts[number].header["generation"]:
                    self.checked[number] = previous.checked[number]
        self._thread: threading.Thread | None = None
        waiting = zip(parts, self.checked, strict=True)
        if sum(part.videos.windows_from(slot) for part, slot in waiting) <= _AT_ONCE:
            self._run()
            self.raise_damage()
        else:
            # A daemon: a command that has its answer ends.
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def raise_damage(self) -> None:
        """Raises the damage that was found so far.

        Raises:
          SearchIndexError: the index is damaged.
        """
        if self._error is not None:
            raise self._error

    def check_now(self, videos: Sequence[IndexedVideo]) -> None:
        """Checks the features of some videos of the index if they are not checked yet.

        Raises:
          SearchIndexError: they are damaged.
        """
        for number, places, rows in by_part([video.slot for video in videos]):
            part, checked = self._parts[number], self.checked[number]
            waiting = [
                (videos[place].path, rows_of_video(videos[place])._replace(slot=row))
                for place, row in zip(places.tolist(), rows.tolist(), strict=True)
                if row >= checked
            ]
            check_features(part.directory, waiting, part.checks)

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

    def _run(self) -> None:
        try:
            for number in range(len(self._parts)):
                self._check_part(number)
            if self._is_first and not self._stopped:
                check_distinct([part.directory for part in self._parts])
        except SearchIndexError as error:
            self._error = error

    def _check_part(self, number: int) -> None:
        part = self._parts[number]
        with Store(part.directory) as store:
            store.check_table()
        for chunk in part.videos.chunks(_CHUNK, self.checked[number]):
            if self._stopped:
                return
            part.check_files()
            pairs = [(video.path, rows_of_video(video)) for video in chunk]
            check_features(part.directory, pairs, part.checks)
            self.checked[number] = chunk[-1].slots.stop
