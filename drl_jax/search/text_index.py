"""The transcripts of the videos of an index in an SQLite file beside its segments.

It can be made again from the transcripts at any time. An update replaces the file by a changed
copy: readers take no lock, and find a whole file or none. Cues are ranked by BM25 of their words,
in which neither case nor diacritics count; languages without spaces between words are not split.
"""

import contextlib
import shutil
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

from drl_jax.runtime.errors import UserError, one_line
from drl_jax.search.transcripts import Cue, Transcript, find_transcripts, read_transcript

FILE = "text.sqlite"
# Transcripts by video and path; how many an index has, and by path why others cannot be used.
_Found: TypeAlias = Mapping[tuple[str, str], Transcript]
_Result: TypeAlias = tuple[int, dict[str, str]]
_VERSION = 1
# The row of a cue is the id of its transcript, and its number in these bits.
_BITS = 20
_TABLES = f"""
PRAGMA user_version = {_VERSION};
CREATE TABLE transcripts (
    id INTEGER PRIMARY KEY, video TEXT, path TEXT, size INTEGER, mtime_ns INTEGER,
    number INTEGER, error TEXT
);
CREATE VIRTUAL TABLE cues USING fts5 (
    text, start UNINDEXED, end UNINDEXED, tokenize = 'unicode61 remove_diacritics 2'
);
"""
_SEARCH = f"""
SELECT rank, video, start, end, text, path
FROM cues JOIN transcripts ON id = cues.rowid >> {_BITS}
WHERE cues.text MATCH ?1 AND (?2 = '' OR video = ?2) ORDER BY rank, video, start, path
"""
# Words in more than this share of the cues, and so many, like "the", are not looked for beside
# other ones: a video in which nothing else of a sentence is said is no answer.
_COMMON, _COMMON_FROM = 0.1, 5
_MAX_WORDS = 64


def update_text(
    directory: Path, work: Path, folder: Path, videos: Collection[str], *, is_all: bool
) -> _Result:
    """Updates the text of an index to the transcripts beside some videos, or beside all of them.

    Only new and changed transcripts are read. `work` is a file to change a copy in. Returns how
    many transcripts the index has, and by path why others cannot be used. Raises UserError if the
    file cannot be written, OSError if a folder cannot be listed.
    """
    path = directory / FILE
    found = {one[:2]: one for one in find_transcripts(folder, videos)}
    try:
        return _update(path, work, found, None if is_all else videos)
    except sqlite3.OperationalError as error:  # E.g. the disk is full.
        raise UserError(f"{path} cannot be written ({one_line(error)})") from error
    except sqlite3.DatabaseError:  # It is damaged, or of another version.
        path.unlink()
        return update_text(directory, work, folder, videos, is_all=is_all)


def _update(path: Path, work: Path, found: _Found, videos: Collection[str] | None) -> _Result:
    known, bad = {}, {}
    if path.exists():
        with _reading(path) as database:
            rows = database.execute("SELECT video, path, size, mtime_ns, id FROM transcripts")
            known = {row[:2]: row[2:] for row in rows if videos is None or row[0] in videos}
    elif not found:
        return 0, bad
    gone = [known[key][-1] for key in known.keys() - found.keys()]
    new = [key for key, one in found.items() if known.get(key, ())[:2] != one[2:4]]
    if gone or new:
        work.unlink(missing_ok=True)
        if path.exists():
            shutil.copyfile(path, work)
        with contextlib.closing(sqlite3.connect(work)) as database, database:
            database.execute("PRAGMA journal_mode = OFF")  # Nobody else has the copy.
            if not path.exists():
                database.executescript(_TABLES)
            for row in gone:
                _delete(database, row)
            for key in new:
                try:
                    _put(database, found[key], known.get(key, (None,))[-1])
                except OSError as error:  # What is known of it is kept.
                    bad[key[1]] = one_line(error)
        work.replace(path)
    with _reading(path) as database:
        rows = database.execute("SELECT path, error FROM transcripts WHERE error != ''")
        bad |= dict(rows.fetchall())
    return count_transcripts(path.parent), dict(sorted(bad.items()))


def _delete(database: sqlite3.Connection, row: int) -> None:
    database.execute("DELETE FROM transcripts WHERE id = ?", (row,))
    ends = (row << _BITS, (row + 1 << _BITS) - 1)
    database.execute("DELETE FROM cues WHERE rowid BETWEEN ? AND ?", ends)


def _put(database: sqlite3.Connection, one: Transcript, known: int | None) -> None:
    """Adds a transcript, or replaces the one in the row `known`; raises OSError."""
    cues, error = [], ""
    try:
        cues = read_transcript(one.file)[: 1 << _BITS]
    except ValueError as reason:
        error = str(reason)
    if known is not None:
        _delete(database, known)
    insert = "INSERT INTO transcripts VALUES (NULL, ?, ?, ?, ?, ?, ?)"
    row = database.execute(insert, (*one[:4], len(cues), error)).lastrowid
    rows = ((row << _BITS | n, cue.text, cue.start, cue.end) for n, cue in enumerate(cues))
    database.executemany("INSERT INTO cues (rowid, text, start, end) VALUES (?, ?, ?, ?)", rows)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Opens a file of this version; raises sqlite3.Error."""
    uri = f"file:{quote(str(path.absolute()))}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
        if database.execute("PRAGMA user_version").fetchone() != (_VERSION,):
            raise sqlite3.DatabaseError("another version made it")
        yield database


def count_transcripts(directory: Path) -> int:
    """How many transcripts an index has; 0 if its file is missing or damaged."""
    with contextlib.suppress(sqlite3.Error), _reading(directory / FILE) as database:
        counted = database.execute("SELECT count(*) FROM transcripts WHERE number > 0")
        return counted.fetchone()[0]
    return 0


def find_cues(
    directory: Path, prefix: str, sentence: str, video: str, failures: list[str]
) -> Iterator[tuple[float, str, Cue]]:
    """Yields the cues with words of a sentence, the best first; of all videos, or of one.

    Yields a number that is lower for better ones, the path of the video, which begins with
    `prefix`, and the cue; nothing if the index has no text. Adds to `failures` why it is damaged.
    """
    path = directory / FILE
    if not path.exists():
        return
    try:
        with _reading(path) as database:
            given = (_expression(database, sentence), video.removeprefix(prefix))
            for rank, of_video, start, end, text, name in database.execute(_SEARCH, given):
                yield rank, prefix + of_video, Cue(start, end, text, prefix + name)
    except sqlite3.Error as error:
        why = f"the text of the index {directory} cannot be searched ({one_line(error)})"
        failures.append(f"{why}; delete {path}, and index the videos again")


def _expression(database: sqlite3.Connection, sentence: str) -> str:
    """What FTS5 looks for: any of the words that are rare, or of all if there is no rare one."""
    given = sentence.replace("\0", " ").encode("utf-8", "replace").decode().split()
    # In quotes, nothing of a word is syntax.
    words = ['"' + word.replace('"', '""') + '"' for word in dict.fromkeys(given)][:_MAX_WORDS]
    count = database.execute("SELECT sum(number) FROM transcripts").fetchone()[0] or 0
    most = max(_COMMON_FROM, _COMMON * count)
    of_word = "SELECT count(*) FROM cues WHERE cues MATCH ?"
    counts = [database.execute(of_word, (word,)).fetchone()[0] for word in words]
    rare = [word for word, count in zip(words, counts, strict=True) if count <= most]
    return " OR ".join(rare or words) or '""'
