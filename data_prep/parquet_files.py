"""Parquet files of captions, and of videos whose bytes are cells. Workers import this module."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from drl_jax.data.video_file import VideoError
from drl_jax.runtime.errors import UserError, one_line

if TYPE_CHECKING:
    import pyarrow

# Rows whose captions are read at a time.
_BATCH = 4096
# Largest size of a row group with videos, bytes. To read it, pyarrow takes 2.0 times as much memory
# (uncompressed, without a dictionary) to 5.7 times (snappy, with one), beside the last one read.
MAX_ROW_GROUP = 10**9


class ParquetError(UserError):
    """A Parquet file that is damaged, or has another form than is needed."""


@dataclasses.dataclass(frozen=True, slots=True)
class ParquetCell:
    """The content of a video in a cell of a Parquet file.

    `column` is a path, e.g. "bytes" or "video.bytes"; `row` is the number in the file, from 0, and
    `index` that in the row group.
    """

    path: Path
    column: str
    row: int
    row_group: int
    index: int

    @property
    def name(self) -> str:
        return str(self.row)

    @property
    def place(self) -> tuple[str, int]:
        """What tells it from other cells of the file."""
        return self.column, self.row

    def open(self, mode: str = "rb") -> BinaryIO:
        """Opens it for reading, like a file of its own; VideoError if the cell is no video.

        Parquet cannot read a cell alone: this reads the column of its row group, which the process
        keeps until it opens a cell of another one.
        """
        status = self.path.stat()
        version = (status.st_size, status.st_mtime_ns)
        column, *fields = self.column.split(".")
        with _damage_as(
            lambda why: VideoError(f"its row cannot be read from {self.path.name} ({why})")
        ):
            cell = _row_group(self.path, version, self.column, self.row_group)[column][self.index]
            for field in fields:
                cell = cell[field] if cell.is_valid else cell
        content = cell.as_buffer() if cell.is_valid else None
        if not content:
            raise VideoError(f"has no bytes in {self.path.name}, row {self.row} (from 0)")
        if is_url(start := content[:60].to_pybytes().decode("latin-1")):
            raise VideoError(
                f"is a URL in {self.path.name}, row {self.row} (from 0): {start}; the cell must"
                " have the content of the file"
            )
        return io.BytesIO(content)


def is_url(text: str) -> bool:
    """Whether a text names a file on the net."""
    return text[:8].lower().startswith(("http://", "https://"))


@functools.lru_cache(maxsize=1)
def _row_group(
    path: Path, version: tuple[int, int], column: str, row_group: int
) -> "pyarrow.Table":
    """A row group's column. The version is that of the file, which may be written again."""
    import pyarrow.parquet

    del version
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        return file.read_row_group(row_group, columns=[column], use_threads=False)


@contextlib.contextmanager
def _damage_as(error_of: Callable[[str], Exception]) -> Iterator[None]:
    """Converts what pyarrow raises for a damaged file, but not errors of the disk."""
    import pyarrow

    try:
        yield
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        if getattr(error, "errno", None):
            raise
        raise error_of(one_line(error)) from error


class ParquetTable:
    """A Parquet file that is read row by row; ParquetError if it is damaged.

    `columns` has the paths of its columns, by their names in lower case without blanks around them.
    """

    def __init__(self, path: Path):
        """Reads the description of the file."""
        import pyarrow.parquet

        self.path = path
        with _damage_as(self._damaged):
            self._file = pyarrow.parquet.ParquetFile(path, pre_buffer=False)
            self._schema = self._file.schema_arrow
        self.rows = self._file.metadata.num_rows
        names = [name.strip().lower() for name in self._schema.names]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ParquetError(f"{path} has two columns {doubled[0]!r}")
        self.columns = dict(zip(names, self._schema.names, strict=True))

    def type(self, column: str) -> "pyarrow.DataType":
        """Type of a column of `columns`; that of the values if it has a dictionary."""
        import pyarrow

        kind = self._schema.field(self.columns[column]).type
        return kind.value_type if pyarrow.types.is_dictionary(kind) else kind

    @property
    def video_column(self) -> str:
        """Path of the column with the contents of videos; empty if there is none.

        It is called `bytes`, or else `video`; `video` may be a struct with a field `bytes`, as
        Hugging Face's datasets has it. If all of them are null, its `path` names a file.
        """
        from pyarrow import types

        for name in ("bytes", "video"):
            if name not in self.columns:
                continue
            kind, path = self.type(name), self.columns[name]
            if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind, path = kind.field("bytes").type, f"{path}.bytes"
                if self._is_null(path):
                    return ""
            if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
                return path
        return ""

    def _is_null(self, path: str) -> bool:
        """Whether the statistics of a column say that it has no value."""
        metadata = self._file.metadata
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            for chunk in map(group.column, range(group.num_columns)):
                is_null = chunk.statistics and chunk.statistics.null_count == chunk.num_values
                if chunk.path_in_schema == path and not is_null:
                    return False
        return self.rows > 0

    def cells(self) -> Iterator[ParquetCell]:
        """The cells of the column with the contents of videos, in the order of the rows."""
        column, row = self.video_column, 0
        metadata = self._file.metadata
        with _damage_as(self._damaged):
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            # The sizes of single columns end the process if the file is damaged (pyarrow 26).
            groups = [(group.num_rows, group.total_byte_size) for group in groups]
        if (count := sum(rows for rows, _ in groups)) != self.rows:
            raise self._damaged(f"{count} rows in its row groups instead of {self.rows}")
        for number, (rows, size) in enumerate(groups):
            if size > MAX_ROW_GROUP:
                raise ParquetError(
                    f"{self.path}: row group {number} ({rows} rows) has {size / 1e9:.1f} GB, and a"
                    " process must read all of its videos for one; write the"
                    " file with smaller row groups, e.g. pyarrow's row_group_size=10"
                )
            for index in range(rows):
                yield ParquetCell(self.path, column, row, number, index)
                row += 1

    def read(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Yields rows in order, as Python values by column, which is a key of `columns`."""
        names = [self.columns[column] for column in columns]
        batches = self._file.iter_batches(batch_size=_BATCH, columns=names, use_threads=False)
        count = 0
        while True:
            with _damage_as(self._damaged):
                if (batch := next(batches, None)) is None:
                    break
                cells = [_values(batch.column(name)) for name in names]
            for row in zip(*cells, strict=True):
                yield dict(zip(columns, row, strict=True))
                count += 1
        if count != self.rows:
            raise self._damaged(f"{count} rows instead of {self.rows}")

    def _damaged(self, reason: str) -> ParquetError:
        return ParquetError(
            f"{self.path} is damaged or no Parquet file ({reason}); copy or write it again, or"
            " remove it"
        )

    def close(self) -> None:
        self._file.close()


def _values(column: "pyarrow.Array") -> list[Any]:
    """The cells; bytes of a text that are not UTF-8 become surrogates, as in names of files."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        kind = pyarrow.large_binary()
        if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
            kind = pyarrow.large_list(kind)
        return [_decoded(cell) for cell in column.cast(kind).to_pylist()]


def _decoded(cell: bytes | list[bytes | None] | None) -> str | list[Any] | None:
    if isinstance(cell, bytes):
        return cell.decode(errors="surrogateescape")
    return cell and [_decoded(text) for text in cell]
