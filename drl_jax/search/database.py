"""The SQLite database of an index, `index.sqlite`."""

import contextlib
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Seconds to wait for another process's transaction.
_BUSY_TIMEOUT = 60
_SCHEMA = """
CREATE TABLE IF NOT EXISTS header (value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS videos (
  path TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
  error TEXT NOT NULL, slot INTEGER UNIQUE, times TEXT NOT NULL, thumbnails BLOB,
  features_crc32 INTEGER, thumbnails_crc32 INTEGER, row_crc32 INTEGER,
  duration REAL, windows TEXT, windows_crc32 TEXT, allowed REAL, window_count INTEGER
);
-- Frames of a video side by side, STRIP_FRAMES in each strip but the last.
CREATE TABLE IF NOT EXISTS strips (
  path TEXT NOT NULL, number INTEGER NOT NULL, jpeg BLOB NOT NULL, crc32 INTEGER NOT NULL,
  PRIMARY KEY (path, number)
);
"""
# Windows of a video that no writer has counted; formats before 5 have one.
_COUNT = "COALESCE(json_array_length(windows), 1)"


def database_path(directory: Path) -> Path:
    """Path of the database of the index in a directory."""
    return directory / "index.sqlite"


def lock_path(directory: Path) -> Path:
    """Path of the file that the process locks that writes to an index."""
    return directory / "lock"


def open_database(directory: Path, *, write: bool) -> sqlite3.Connection:
    """Connects to the database.

    Args:
      directory: of the index.
      write: creates the tables if they are missing; otherwise the connection reads one state, in
        one transaction, until it is closed.

    Raises:
      sqlite3.DatabaseError: it is not a database.
    """
    connection = sqlite3.connect(database_path(directory), timeout=_BUSY_TIMEOUT)
    if write:
        connection.executescript(_SCHEMA)
    else:
        connection.execute("BEGIN")
    return connection


def _selected(connection: sqlite3.Connection, names: Sequence[str]) -> str:
    """Columns of the table of videos, for SELECT; NULL for those that an older format lacks."""
    present = {row[1] for row in connection.execute("PRAGMA table_info(videos)")}
    return ", ".join(name if name in present else "NULL" for name in names)


def upgrade(connection: sqlite3.Connection, names: Sequence[str], types: Mapping[str, str]) -> None:
    """Adds what the tables of an older version lack.

    Args:
      connection: in a transaction.
      names: columns of the table of videos that describe a video.
      types: of columns that it may lack; they are NULL in the rows that exist.
    """
    present = {row[1] for row in connection.execute("PRAGMA table_info(videos)")}
    for name, kind in types.items():
        if name not in present:
            connection.execute(f"ALTER TABLE videos ADD COLUMN {name} {kind}")
    if "window_count" not in present:
        connection.execute("ALTER TABLE videos ADD COLUMN window_count INTEGER")
        connection.execute(f"UPDATE videos SET window_count = {_COUNT} WHERE slot IS NOT NULL")
    # With all that opening an index reads: a row of the table is much longer.
    connection.execute("CREATE INDEX IF NOT EXISTS video_slots ON videos (slot, window_count)")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS removed_videos"
        f" (generation INTEGER NOT NULL, {', '.join(names)})"
    )
    connection.execute(
        "CREATE INDEX IF NOT EXISTS removed_slots ON removed_videos (generation, slot)"
    )


def select_videos(connection: sqlite3.Connection, names: Sequence[str]) -> list[tuple]:
    """Columns of all videos, in no order: an order would rely on an index that may be damaged."""
    return connection.execute(f"SELECT {_selected(connection, names)} FROM videos").fetchall()


def select_slots(connection: sqlite3.Connection) -> list[tuple[int, int]]:
    """First slot and number of windows of each video that has some, in no order."""
    present = {row[1] for row in connection.execute("PRAGMA table_info(videos)")}
    count = "window_count" if "window_count" in present else _COUNT
    if not {"window_count", "windows"} & present:
        count = "1"
    return connection.execute(f"SELECT slot, {count} FROM videos WHERE slot NOTNULL").fetchall()


def select_at_slots(
    connection: sqlite3.Connection, slots: Sequence[int], names: Sequence[str]
) -> list[tuple]:
    """Columns of the videos whose first slots are these."""
    marks = ", ".join("?" * len(slots))
    query = f"SELECT {_selected(connection, names)} FROM videos WHERE slot IN ({marks})"
    return connection.execute(query, slots).fetchall()


def select_removed(
    connection: sqlite3.Connection, slots: Sequence[int], generation: int, names: Sequence[str]
) -> list[tuple]:
    """The same of videos that an earlier state of the index had."""
    if not _has_table(connection, "removed_videos"):
        return []
    marks = ", ".join("?" * len(slots))
    return connection.execute(
        f"SELECT {', '.join(names)} FROM removed_videos WHERE generation = ? AND slot IN ({marks})",
        (generation, *slots),
    ).fetchall()


def select_without_slot(connection: sqlite3.Connection, names: Sequence[str]) -> list[tuple]:
    """Columns of the videos that cannot be searched."""
    query = f"SELECT {_selected(connection, names)} FROM videos WHERE slot IS NULL"
    return connection.execute(query).fetchall()


def count_rows(connection: sqlite3.Connection) -> int:
    """Rows of the table of videos, counted without its indexes."""
    return connection.execute("SELECT COUNT(*) FROM videos NOT INDEXED").fetchone()[0]


def check_pages(connection: sqlite3.Connection) -> None:
    """Checks all pages of the database, and that its indexes have the rows of their tables.

    Raises:
      sqlite3.DatabaseError: it is damaged.
    """
    (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(found)


def select_listing(connection: sqlite3.Connection) -> Iterator[tuple]:
    """Slot, path, time, duration, and times where there is no duration, of videos with a slot."""
    duration = _selected(connection, ("duration",))
    # Older versions stored no duration.
    return connection.execute(
        f"SELECT slot, path, mtime_ns, {duration}, CASE WHEN {duration} IS NULL THEN times END"
        " FROM videos WHERE slot NOTNULL"
    )


def select_slots_of_path(
    connection: sqlite3.Connection, path: str, generation: int, current: int
) -> list[int]:
    """First slots of the videos with a path in all states of a generation."""
    rows = []
    if generation == current:
        rows = connection.execute("SELECT slot FROM videos WHERE path = ?", (path,)).fetchall()
    if _has_table(connection, "removed_videos"):
        rows += connection.execute(
            "SELECT slot FROM removed_videos WHERE generation = ? AND path = ?", (generation, path)
        ).fetchall()
    return [slot for (slot,) in rows if slot is not None]


def _has_table(connection: sqlite3.Connection, name: str) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return connection.execute(query, (name,)).fetchone() is not None


def select_video(
    connection: sqlite3.Connection, path: str, names: Sequence[str]
) -> tuple[Any, ...] | None:
    """Columns of a video; None if there is none of this path."""
    query = f"SELECT {_selected(connection, names)} FROM videos"
    # The index of the table finds it at once, but may be damaged; the plus sign reads all rows.
    for condition in ("path = ?", "+path = ?"):
        row = connection.execute(f"{query} WHERE {condition}", (path,)).fetchone()
        if row is not None:
            return row
    return None


def replace_videos(
    connection: sqlite3.Connection, names: Sequence[str], rows: Sequence[tuple]
) -> None:
    """Adds or replaces rows of the table of videos."""
    marks = ", ".join("?" * len(names))
    connection.executemany(
        f"INSERT OR REPLACE INTO videos ({', '.join(names)}) VALUES ({marks})", rows
    )


def select_strip(
    connection: sqlite3.Connection, path: str, number: int
) -> tuple[bytes, int | None] | None:
    """A strip of frames and its checksum; None if there is none."""
    if _has_table(connection, "strips"):
        query = "SELECT jpeg, crc32 FROM strips WHERE path = ? AND number = ?"
        row = connection.execute(query, (path, number)).fetchone()
        if row is not None:
            return row
    # Format 4 and older have one strip, in the table of videos.
    row = None if number else select_video(connection, path, ("thumbnails", "thumbnails_crc32"))
    return None if row is None or row[0] is None else row


def remove_videos(
    connection: sqlite3.Connection, paths: Sequence[str], generation: int, names: Sequence[str]
) -> None:
    """Removes videos and their strips; open readers still find the videos by their slots."""
    rows = [(path,) for path in paths]
    connection.executemany(
        f"INSERT INTO removed_videos SELECT {int(generation)}, {', '.join(names)} FROM videos"
        " WHERE path = ? AND slot NOTNULL",
        rows,
    )
    for table in ("videos", "strips"):
        connection.executemany(f"DELETE FROM {table} WHERE path = ?", rows)


def keep_slots_of(connection: sqlite3.Connection, generation: int, names: Sequence[str]) -> None:
    """Keeps all videos for open readers, before their slots change."""
    connection.execute(
        f"INSERT INTO removed_videos SELECT ?, {', '.join(names)} FROM videos WHERE slot NOTNULL",
        (generation,),
    )


def forget_removed(connection: sqlite3.Connection, generation: int) -> None:
    """Forgets what is kept for readers of generations before this one."""
    connection.execute("DELETE FROM removed_videos WHERE generation < ?", (generation,))


def add_strips(connection: sqlite3.Connection, path: str, strips: Sequence[bytes]) -> None:
    """Adds the strips of a video that has none."""
    rows = [(path, number, jpeg, zlib.crc32(jpeg)) for number, jpeg in enumerate(strips)]
    connection.executemany("INSERT INTO strips VALUES (?, ?, ?, ?)", rows)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commits all changes of a block, or none if it raises; the version increases by one."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute(f"PRAGMA user_version = {version + 1}")


def index_version(directory: Path) -> tuple[int, ...]:
    """Identifies the state of an index: differs after every transaction. Empty: no index."""
    database = database_path(directory)
    try:
        status = database.stat()
        uri = f"{database.resolve().as_uri()}?mode=ro"
        with contextlib.closing(
            sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT)
        ) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
    except (OSError, sqlite3.DatabaseError):
        return ()
    # Inode and modification time differ if the index was deleted and created again.
    return (status.st_ino, status.st_mtime_ns, version)
