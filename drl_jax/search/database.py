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
  duration REAL, windows TEXT, windows_crc32 TEXT, allowed REAL
);
-- Frames of a video side by side, STRIP_FRAMES in each strip but the last.
CREATE TABLE IF NOT EXISTS strips (
  path TEXT NOT NULL, number INTEGER NOT NULL, jpeg BLOB NOT NULL, crc32 INTEGER NOT NULL,
  PRIMARY KEY (path, number)
);
"""


def database_path(directory: Path) -> Path:
    """Path of the database of the index in a directory."""
    return directory / "index.sqlite"


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


def add_columns(connection: sqlite3.Connection, types: Mapping[str, str]) -> None:
    """Adds columns that the table of videos lacks; NULL in the rows that exist."""
    present = {row[1] for row in connection.execute("PRAGMA table_info(videos)")}
    for name, kind in types.items():
        if name not in present:
            connection.execute(f"ALTER TABLE videos ADD COLUMN {name} {kind}")


def select_videos(connection: sqlite3.Connection, names: Sequence[str]) -> list[tuple]:
    """Columns of all videos, in no order: an order would rely on an index that may be damaged."""
    return connection.execute(f"SELECT {_selected(connection, names)} FROM videos").fetchall()


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
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'strips'").fetchone():
        query = "SELECT jpeg, crc32 FROM strips WHERE path = ? AND number = ?"
        row = connection.execute(query, (path, number)).fetchone()
        if row is not None:
            return row
    # Format 4 and older have one strip, in the table of videos.
    row = None if number else select_video(connection, path, ("thumbnails", "thumbnails_crc32"))
    return None if row is None or row[0] is None else row


def remove_videos(connection: sqlite3.Connection, paths: Sequence[str]) -> None:
    """Removes videos and their strips."""
    for table in ("videos", "strips"):
        rows = [(path,) for path in paths]
        connection.executemany(f"DELETE FROM {table} WHERE path = ?", rows)


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
