"""The SQLite database of an index: `index.sqlite`."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

# Seconds to wait for another process's transaction.
_BUSY_TIMEOUT = 60
_SCHEMA = """
CREATE TABLE IF NOT EXISTS header (value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS videos (
  path TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
  error TEXT NOT NULL, slot INTEGER UNIQUE, times TEXT NOT NULL, thumbnails BLOB
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
