"""Ids, sources and captions of a dataset, in files that are mapped into memory.

They are Arrow IPC files with one record batch: processes of a machine share them, and opening one
does not depend on its size.

- `videos.arrow` has a row for each record: `video_id`, the first 8 bytes of its SHA-256 as a
  number, and the source: `file`, and `start` and `end` in seconds for a part of it.
- `captions.SPLIT.arrow` has a row for each video of a split: the index of its record (`video`), and
  `captions`.

Offsets have 64 bits, since the texts may exceed 2 GB. `metadata.json` has the rest: the layout, the
names of the splits, and their pairs of reversed clips.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from drl_jax.data.splits import CaptionOrigin, Captions, Split, offsets_of
from drl_jax.runtime.files import sha256

# Layout of these files and of `metadata.json`. A dataset with another one has to be built again.
LAYOUT = 2
METADATA, _VIDEOS_FILE, _CAPTIONS_FILE = "metadata.json", "videos.arrow", "captions.{}.arrow"
_VIDEOS_SCHEMA = pa.schema(
    {
        "video_id": pa.large_string(),
        "id_hash": pa.uint64(),
        "file": pa.large_string(),
        "start": pa.float64(),
        "end": pa.float64(),
    }
)
_CAPTIONS_SCHEMA = pa.schema({"video": pa.int32(), "captions": pa.large_list(pa.large_string())})
# Rows that are converted at a time.
_ROWS = 65536


class Strings(Sequence[str]):
    """A column of strings; one is decoded when it is accessed."""

    def __init__(self, column: pa.LargeStringArray):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self._column[index].to_pylist()
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


def write_videos(directory: Path, ids: Iterable[str], sources: Iterable[list]) -> None:
    """Writes the file of the records; the sources are those of `Sources`."""
    rows = (
        (video_id, _id_hash(video_id), file, *(span or (None, None)))
        for video_id, (file, *span) in zip(ids, sources, strict=True)
    )
    # In parts, since the rows as Python objects take ten times the memory of the columns.
    parts = []
    while part := list(itertools.islice(rows, _ROWS)):
        columns = zip(zip(*part, strict=True), _VIDEOS_SCHEMA.types, strict=True)
        parts.append([pa.array(column, kind) for column, kind in columns])
    columns = [pa.concat_arrays(arrays) for arrays in zip(*parts, strict=True)]
    _write(directory / _VIDEOS_FILE, columns, _VIDEOS_SCHEMA)


def _id_hash(video_id: str) -> int:
    """As a number, whose order is that of the whole hashes."""
    return int.from_bytes(hashlib.sha256(video_id.encode()).digest()[:8])


def read_videos(directory: Path, hashes: Mapping[str, str]) -> tuple[Strings, Sources, np.ndarray]:
    """Opens the file of the records: ids, sources, and the hash of each id as uint64 [V].

    OSError, ValueError or KeyError if it is missing, or not the one with the SHA-256 of its name.
    """
    batch = _read(directory, _VIDEOS_FILE, _VIDEOS_SCHEMA, hashes)
    ids, id_hashes, files, starts, ends = batch.columns
    return Strings(ids), Sources(files, starts, ends), id_hashes.to_numpy()


def write_captions(
    directory: Path, split: str, videos: Sequence[int], captions: Sequence[Sequence[str]]
) -> None:
    """Writes the captions of a split's videos, which have these record indices."""
    offsets = offsets_of([len(sentences) for sentences in captions])
    texts = (text for sentences in captions for text in sentences)
    values = pa.array(texts, pa.large_string(), size=int(offsets[-1]))
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), values)
    columns = [pa.array(videos, pa.int32()), lists]
    _write(directory / _CAPTIONS_FILE.format(split), columns, _CAPTIONS_SCHEMA)


def read_split(
    directory: Path, name: str, pairs: Sequence[Sequence[int]], hashes: Mapping[str, str]
) -> Split:
    """Opens the captions of a split with these pairs of reversed clips; raises as `read_videos`."""
    file = _CAPTIONS_FILE.format(name)
    batch = _read(directory, file, _CAPTIONS_SCHEMA, hashes)
    videos, captions = batch.columns
    offsets = captions.offsets.to_numpy()
    origin = CaptionOrigin(directory, name, hashes[file])
    captions = Captions(Strings(captions.values), offsets[:-1], offsets, origin)
    return Split(videos.to_numpy(), captions, np.asarray(pairs, np.int32).reshape(-1, 2))


def _write(path: Path, columns: Sequence[pa.Array], schema: pa.Schema) -> None:
    batch = pa.record_batch(columns, schema=schema)
    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch)


def _read(
    directory: Path, name: str, schema: pa.Schema, hashes: Mapping[str, str]
) -> pa.RecordBatch:
    if sha256(directory / name) != hashes[name]:
        raise ValueError(f"{name} is not the file that the build wrote")
    reader = pa.ipc.open_file(pa.memory_map(str(directory / name)))
    if reader.schema != schema or reader.num_record_batches != 1:
        raise ValueError(f"{name} does not have the columns {', '.join(schema.names)}")
    return reader.get_batch(0)
