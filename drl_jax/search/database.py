"""Statements on the SQLite database of an index."""

import sqlite3
import zlib
from collections.abc import Sequence
from typing import Any

from drl_jax.search.database_file import COUNTED


def _selected(connection: sqlite3.Connection, names: Sequence[str]) -> str:
    """Columns of the table of videos, for SELECT; NULL for those that an older format lacks."""
    present = {row[1] for row in connection.execute("PRAGMA table_info(videos)")}
    return ", ".join(name if name in present else "NULL" for name in names)


def select_videos(connection: sqlite3.Connection, names: Sequence[str]) -> sqlite3.Cursor:
    """Columns of all videos, in no order: an order would rely on an index that may be damaged."""
    return connection.execute(f"SELECT {_selected(connection, names)} FROM videos NOT INDEXED")


def select_paths(connection: sqlite3.Connection) -> sqlite3.Cursor:
    """Paths of all videos."""
    return connection.execute("SELECT path FROM videos")


def select_slots(connection: sqlite3.Connection) -> sqlite3.Cursor:
    """First slot and number of windows of each video that has some, in no order."""
    present = {row[1] for row in connection.execute("PRAGMA table_info(videos)")}
    count = "window_count" if "window_count" in present else COUNTED
    if not {"window_count", "windows"} & present:
        count = "1"
    return connection.execute(f"SELECT slot, {count} FROM videos WHERE slot NOTNULL")


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
    """Rows of the table of videos, counted without its indexes; reads all of them."""
    return connection.execute("SELECT COUNT(*) FROM videos NOT INDEXED").fetchone()[0]


def count_with_slot(connection: sqlite3.Connection) -> int:
    """Videos that can be searched."""
    return connection.execute("SELECT COUNT(*) FROM videos WHERE slot NOTNULL").fetchone()[0]


def count_without_slot(connection: sqlite3.Connection) -> int:
    """Videos that cannot be searched."""
    return connection.execute("SELECT COUNT(*) FROM videos WHERE slot IS NULL").fetchone()[0]


def count_windows(connection: sqlite3.Connection) -> int:
    """Windows of all videos, in a database that was upgraded; reads an index of the table."""
    return connection.execute("SELECT COALESCE(SUM(window_count), 0) FROM videos").fetchone()[0]


def has_rows(connection: sqlite3.Connection) -> bool:
    """Whether the table of videos has a row."""
    return connection.execute("SELECT 1 FROM videos LIMIT 1").fetchone() is not None


def check_pages(connection: sqlite3.Connection) -> None:
    """Checks all pages of the database, and that its indexes have the rows of their tables.

    Raises:
      sqlite3.DatabaseError: it is damaged.
    """
    (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(found)


def select_listing(connection: sqlite3.Connection) -> sqlite3.Cursor:
    """Slot, path, time, duration, and times where there is no duration, of videos with a slot."""
    duration = _selected(connection, ("duration",))
    # Older versions stored no duration.
    return connection.execute(
        f"SELECT slot, path, mtime_ns, {duration}, CASE WHEN {duration} IS NULL THEN times END"
        " FROM videos WHERE slot NOTNULL"
    )


def select_slots_of_paths(
    connection: sqlite3.Connection, paths: Sequence[str], generation: int, current: int
) -> list[tuple[str, int, str]]:
    """Path, first slot and hash of the files with some paths in all states of a generation."""
    marks, rows = ", ".join("?" * len(paths)), []
    columns = f"path, slot, sha256 FROM {{}} WHERE path IN ({marks}) AND slot NOTNULL"
    if generation == current:
        rows = connection.execute(f"SELECT {columns.format('videos')}", paths).fetchall()
    if _has_table(connection, "removed_videos"):
        query = f"SELECT {columns.format('removed_videos')} AND generation = ?"
        rows += connection.execute(query, (*paths, generation)).fetchall()
    return rows


def _has_table(connection: sqlite3.Connection, name: str) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return connection.execute(query, (name,)).fetchone() is not None


def select_video(
    connection: sqlite3.Connection, path: str, names: Sequence[str], *, scan: bool = True
) -> tuple[Any, ...] | None:
    """Columns of a video; None if there is none of this path.

    Args:
      connection: to the database.
      path: of the video.
      names: of the columns.
      scan: reads all rows if the index of the table, which may be damaged, does not have the path.
    """
    query = f"SELECT {_selected(connection, names)} FROM videos"
    # The plus sign keeps SQLite from using the index.
    for condition in ("path = ?", "+path = ?")[: 1 + scan]:
        row = connection.execute(f"{query} WHERE {condition}", (path,)).fetchone()
        if row is not None:
            return row
    return None


def update_slots(connection: sqlite3.Connection, old: Sequence[int], new: Sequence[int]) -> None:
    """Moves videos to other slots, in this order: each new slot must be free by then."""
    pairs = zip(new, old, strict=True)
    connection.executemany("UPDATE videos SET slot = ? WHERE slot = ?", pairs)


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
) -> tuple[int, int]:
    """Removes videos and their strips; open readers still find the videos by their slots.

    Returns:
      The numbers of videos and of windows that were removed.
    """
    rows = [(path,) for path in paths]
    query = "SELECT COUNT(*), COALESCE(SUM(window_count), 0) FROM videos WHERE path = ?"
    counts = [connection.execute(query, row).fetchone() for row in rows]
    connection.executemany(
        f"INSERT INTO removed_videos SELECT {int(generation)}, {', '.join(names)} FROM videos"
        " WHERE path = ? AND slot NOTNULL",
        rows,
    )
    for table in ("videos", "strips"):
        connection.executemany(f"DELETE FROM {table} WHERE path = ?", rows)
    return sum(videos for videos, _ in counts), sum(windows for _, windows in counts)


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
