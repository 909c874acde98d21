"""The SQLite database of an index, `index.sqlite`: its tables, transactions and version."""

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

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
COUNTED = "COALESCE(json_array_length(windows), 1)"


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
        connection.execute(f"UPDATE videos SET window_count = {COUNTED} WHERE slot IS NOT NULL")
    # With all that opening an index reads: a row of the table is much longer.
    connection.execute("CREATE INDEX IF NOT EXISTS video_slots ON videos (slot, window_count)")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS removed_videos"
        f" (generation INTEGER NOT NULL, {', '.join(names)})"
    )
    connection.execute(
        "CREATE INDEX IF NOT EXISTS removed_slots ON removed_videos (generation, slot)"
    )


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
