"""Writes the files of `custom` that contain videos: WebDataset shards and Parquet files."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet


def write_tar(path: Path, members: Iterable[tuple[str, bytes | str]]) -> Path:
    """Writes an uncompressed tar file with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    """Writes a table; values are lists or pyarrow arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, **options)
    return path
