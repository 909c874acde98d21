"""The header of an index: what it was made with, and which rows of its arrays are used."""

import json
import sqlite3
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drl_jax.search.database import has_rows
from drl_jax.search.format_2 import header_from_format_2
from drl_jax.search.rows import SearchIndexError

# Formats of an index, and of one that has only a shard of the files of its folder.
FORMAT, SHARD_FORMAT = 5, 6
_HEADER_TYPES = {
    "source": dict,
    "fingerprint": str,
    "videos": str,
    "storage": str,
    "arrays": dict,
    "generation": int,
    "next_slot": int,
    "obsolete_files": list,
}


def read_header(directory: Path, database: sqlite3.Connection) -> dict[str, Any]:
    """Reads the header of an index; empty if it has none yet.

    Raises:
      SearchIndexError: a later version of this program made it.
      KeyError, TypeError, ValueError: it is damaged.
    """
    row = database.execute("SELECT value FROM header").fetchone()
    if row is None and has_rows(database):
        raise ValueError("it has videos without a header")
    if row is None:
        return {}
    header = json.loads(row[0])
    if header["format"] == 2:
        query = "SELECT COALESCE(MAX(slot) + 1, 0) FROM videos"
        return header_from_format_2(header, database.execute(query).fetchone()[0])
    if header["format"] not in (3, 4, FORMAT, SHARD_FORMAT):
        raise SearchIndexError(
            f"the index {directory} has format {header['format']}, this version reads"
            f" formats 2 to {SHARD_FORMAT}; delete it and index again"
        )
    check_header(header)
    # A transaction adds those of the new state.
    return {name: header[name] for name in header.keys() - {"format", "crc32"}}


def header_crc32(header: Mapping[str, Any]) -> int:
    """Checksum of a header, without its own field `crc32`."""
    values = {name: value for name, value in header.items() if name != "crc32"}
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def check_header(header: Mapping[str, Any]) -> None:
    """Checks a header of format 3 or later.

    Raises:
      ValueError: it is damaged.
    """
    if ("crc32" in header or header["format"] > 3) and header.get("crc32") != header_crc32(header):
        raise ValueError("the checksum of its header is wrong")
    for name, kind in _HEADER_TYPES.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(f"its header has no {name}")
