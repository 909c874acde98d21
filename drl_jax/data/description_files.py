"""Files of a dataset's ids, sources and captions.

They are Arrow IPC files with one record batch, which are mapped into memory and not read: processes
of a machine share them, and opening one does not depend on its size.

- `videos.arrow` has a row for each record: `video_id`, the first 8 bytes of its SHA-256 as a
  number (`id_hash`), and the source: `file`, and `start` and `end` in seconds for a part of it.
- `captions.SPLIT.arrow` has a row for each video of a split: the index of its record (`video`), and
  `captions`.

Offsets have 64 bits, since the texts may exceed 2 GB.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from drl_jax.data.splits import CaptionOrigin, Captions

VIDEOS_FILE = "videos.arrow"
_VIDEOS_SCHEMA = pa.schema(
    {
        "video_id": pa.large_string(),
        "id_hash": pa.uint64(),
        "file": pa.large_string(),
        "start": pa.float64(),
        "end": pa.float64(),
    }
)
# Rows that are converted at a time.
_ROWS = 65536
_CAPTIONS_SCHEMA = pa.schema({"video": pa.int32(), "captions": pa.large_list(pa.large_string())})


def captions_file(split: str) -> str:
    """Name of the file of a split's captions."""
    return f"captions.{split}.arrow"


def id_hash(video_id: str) -> int:
    """The first 8 bytes of the SHA-256 of an id, as a number: smaller hash, smaller number."""
    return int.from_bytes(hashlib.sha256(video_id.encode()).digest()[:8])


class Strings(Sequence[str]):
    """A column of strings; one is decoded when it is accessed."""

    def __init__(self, column: pa.LargeStringArray):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._column[start:stop].to_pylist()
            return [self[row] for row in range(start, stop, step)]
        return self._column[int(index)].as_py()


class Sources(Sequence[list]):
    """Source of each record: [path below the videos' folder] or [path, start, end] in seconds."""

    def __init__(self, files: pa.LargeStringArray, starts: pa.DoubleArray, ends: pa.DoubleArray):
        self._files, self._starts, self._ends = files, starts, ends

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> list:
        start = self._starts[int(index)].as_py()
        span = [] if start is None else [start, self._ends[int(index)].as_py()]
        return [self._files[int(index)].as_py(), *span]

    def of_same_files(self, records: np.ndarray) -> np.ndarray:
        """Indices of all records whose files are those of these, ascending."""
        found = pc.is_in(self._files, value_set=self._files.take(pa.array(records)))
        return np.flatnonzero(found.to_numpy(zero_copy_only=False))


@dataclasses.dataclass(frozen=True)
class Videos:
    """Description of the records, in their order.

    Attributes:
      ids: their ids.
      sources: their sources (`Sources`); empty for a dataset of a version that did not store them.
      id_hashes: uint64, `id_hash` of each; None for a dataset of such a version.
    """

    ids: Sequence[str]
    sources: Sequence[list]
    id_hashes: np.ndarray | None


def write_videos(directory: Path, ids: Iterable[str], sources: Iterable[list]) -> None:
    """Writes the file of the records.

    Args:
      directory: of the dataset.
      ids: of the records, in their order.
      sources: of the records, see `Sources`.

    Raises:
      OSError: it cannot be written, e.g. because the disk is full.
    """
    rows = (
        (video_id, id_hash(video_id), file, *(span or (None, None)))
        for video_id, (file, *span) in zip(ids, sources, strict=True)
    )
    # In parts, since the rows as Python objects take ten times the memory of the columns.
    parts = []
    while part := list(itertools.islice(rows, _ROWS)):
        columns = zip(*part, strict=True)
        parts.append(
            [
                pa.array(column, kind)
                for column, kind in zip(columns, _VIDEOS_SCHEMA.types, strict=True)
            ]
        )
    columns = [pa.concat_arrays(arrays) for arrays in zip(*parts, strict=True)]
    _write(directory / VIDEOS_FILE, columns, _VIDEOS_SCHEMA)


def read_videos(directory: Path) -> Videos:
    """Opens the file of the records.

    Raises:
      OSError, ValueError: it is damaged.
    """
    batch = _read(directory / VIDEOS_FILE, _VIDEOS_SCHEMA)
    ids, hashes, files, starts, ends = batch.columns
    return Videos(Strings(ids), Sources(files, starts, ends), hashes.to_numpy())


def write_captions(
    directory: Path, split: str, videos: Sequence[int], captions: Sequence[Sequence[str]]
) -> None:
    """Writes the file of a split's captions.

    Args:
      directory: of the dataset.
      split: name of the split.
      videos: record indices of its videos.
      captions: of each video.

    Raises:
      OSError: it cannot be written, e.g. because the disk is full.
    """
    offsets = np.zeros(len(captions) + 1, np.int64)
    np.cumsum([len(sentences) for sentences in captions], out=offsets[1:])
    texts = (text for sentences in captions for text in sentences)
    values = pa.array(texts, pa.large_string(), size=int(offsets[-1]))
    columns = [
        pa.array(videos, pa.int32()),
        pa.LargeListArray.from_arrays(pa.array(offsets), values),
    ]
    _write(directory / captions_file(split), columns, _CAPTIONS_SCHEMA)


def read_captions(origin: CaptionOrigin) -> tuple[np.ndarray, Captions]:
    """Opens the file of a split's captions.

    Returns:
      Record indices of the videos, int32 [V], and their captions.

    Raises:
      OSError, ValueError: it is damaged.
    """
    batch = _read(origin.directory / captions_file(origin.split), _CAPTIONS_SCHEMA)
    videos, captions = batch.columns
    offsets = captions.offsets.to_numpy()
    return videos.to_numpy(), Captions(Strings(captions.values), offsets[:-1], offsets, origin)


def _write(path: Path, columns: Sequence[pa.Array], schema: pa.Schema) -> None:
    batch = pa.record_batch(columns, schema=schema)
    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch)


def _read(path: Path, schema: pa.Schema) -> pa.RecordBatch:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if reader.schema != schema or reader.num_record_batches != 1:
        raise ValueError(f"{path.name} does not have the columns {', '.join(schema.names)}")
    return reader.get_batch(0)
