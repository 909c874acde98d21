"""Reading an index to compare it with its files."""

from collections.abc import Iterator, Sequence

from drl_jax.search.array_files import map_arrays
from drl_jax.search.database import check_pages, select_video, select_videos
from drl_jax.search.feature_checks import FeatureChecks, rows_of_row
from drl_jax.search.rows import COLUMNS, KnownFile, check_row, known_file
from drl_jax.search.store import Store


class ComparedStore(Store):
    """An index that an update compares with its files: rows are checked, but not decoded."""

    def check_database(self) -> None:
        """Checks the whole database: also what an update does not read, but a query does.

        Raises:
          SearchIndexError: it is damaged.
        """
        with self._reading():
            check_pages(self._database)

    def files(self) -> Iterator[KnownFile]:
        """All files, in no order, each with its row and its features checked.

        Raises:
          SearchIndexError: a row is damaged.
        """
        with self._reading():
            checks, listed = self._feature_checks(), 0
            for row in select_videos(self._database, COLUMNS):
                listed += 1
                yield self._known_file(row, checks)
            self._check_count(listed)

    def file_at(self, path: str) -> KnownFile | None:
        """The file with a path, checked as by `files`; None if there is none.

        The time it takes does not depend on the number of files.

        Raises:
          SearchIndexError: the row is damaged.
        """
        with self._reading():
            row = select_video(self._database, path, COLUMNS, scan=False)
            return None if row is None else self._known_file(row, self._feature_checks())

    def _feature_checks(self) -> FeatureChecks:
        return FeatureChecks(map_arrays(self.directory, self.header["arrays"], strict=False))

    def _known_file(self, row: tuple, checks: FeatureChecks) -> KnownFile:
        check_row(row)
        if row[COLUMNS.index("slot")] is None:
            return known_file(row, is_damaged=False)
        rows = rows_of_row(row)
        self._check_stop(row[0], rows.stop)
        return known_file(row, is_damaged=checks.is_damaged(rows))

    def errors(self, paths: Sequence[str] | None) -> dict[str, str]:
        """Why files cannot be searched, by path; of the files with these paths, or of all."""
        if paths is None:
            return {video.path: video.error for video in self.unsearchable()}
        with self._reading():
            rows = [select_video(self._database, p, ("path", "error"), scan=False) for p in paths]
        return dict(row for row in rows if row is not None and row[1])
