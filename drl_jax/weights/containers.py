"""Opens files of weights of any form: what they hold, without reading the values.

The content decides what a file is: a zip archive of `torch.save` or TorchScript, the older stream
of `torch.save`, safetensors, or an index of several such files. PyTorch is not needed, and no code
in a file is executed.
"""

import io
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from drl_jax.runtime.errors import UserError, one_line, raise_if_refused
from drl_jax.weights.errors import WeightsError, about, refused
from drl_jax.weights.source import INDEX, SHARD, parts_of
from drl_jax.weights.tensors import Storage, Tensor
from drl_jax.weights.torch_pickle import find_tensors, load_pickle

# The first number of a legacy file, and the protocol that follows it.
_LEGACY_START = (0x1950A86A20F9469CFC6C, 1001)
_MAX_PICKLE_BYTES = 256 * 2**20
_SAFETENSORS_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8},
    **{"U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "BOOL": np.bool_},
}


class Contents(NamedTuple):
    """What a file of weights holds."""

    tensors: dict[str, Tensor]  # by name; those of nested dicts and modules are joined by dots
    inert: dict[str, str]  # the classes of other values, by name
    form: str  # of the file, in words
    files: tuple[Path, ...]  # that the tensors are in
    metadata: Mapping[str, str] = MappingProxyType({})  # of a safetensors file


def open_weights(path: Path, *, is_part: bool = False) -> Contents:
    """Opens a file of weights and lists its tensors.

    Raises:
      WeightsError: the file cannot be read safely and completely, or it is none of these.
      Unavailable: there is no such file, or it cannot be read.
    """
    with about(path):
        if path.exists() and not path.is_file():
            raise WeightsError("is no regular file")
        with path.open("rb") as file:
            start = file.read(64)
        if SHARD.search(path.name) and not is_part:
            index = SHARD.sub(lambda match: "." + match[0].rpartition(".")[2] + INDEX, path.name)
            raise WeightsError(f"is one part of several; name {index} or the folder")
        kinds = (kind for pattern, kind in _KINDS if re.match(pattern, start, re.I | re.S))
        kind, problem = next(kinds, ""), "is damaged, or not a PyTorch or safetensors file"
        if isinstance(kind, str) and path.name.endswith(INDEX):
            kind = _open_index
        if isinstance(kind, str):
            raise WeightsError(f"is {kind}" if kind else problem)
        try:
            return kind(path)
        except UserError:
            raise
        # Libraries raise many types of errors for damaged files.
        except Exception as error:
            raise_if_refused(path, error)
            raise WeightsError(f"{problem} ({one_line(error)})") from error


# ---------------------------------------------------------------- safetensors


def _open_safetensors(path: Path) -> Contents:
    with safetensors.safe_open(path, framework="numpy") as file:  # Checks the whole header.
        metadata = file.metadata() or {}
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    tensors, inert = {}, {}
    for name, entry in header.items():
        dtype = entry["dtype"]
        if dtype not in _SAFETENSORS_DTYPES:
            inert[name] = dtype
            continue
        shape, at = entry["shape"], 8 + size + entry["data_offsets"][0]
        storage = Storage(path, np.dtype(_SAFETENSORS_DTYPES[dtype]), math.prod(shape), at)
        tensors[name] = Tensor(storage, shape)
    return Contents(tensors, inert, "safetensors", (path,), metadata)


def _open_index(path: Path) -> Contents:
    """The files of a list, as one."""
    files = parts_of(path)
    parts = {n: open_weights(path.with_name(n), is_part=True) for n in sorted(set(files.values()))}
    tensors = {}
    for name, file in files.items():
        if name not in parts[file].tensors:
            raise WeightsError(f"says that {file} has {name}, which it has not; get both again")
        tensors[name] = parts[file].tensors[name]
    form = f"{len(parts)} parts, {next(iter(parts.values())).form}"
    inert = {name: kind for part in parts.values() for name, kind in part.inert.items()}
    return Contents(tensors, inert, form, tuple(map(path.with_name, parts)))


# ---------------------------------------------------------------- PyTorch


def _open_zip(path: Path) -> Contents:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        _check_entries(archive)
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise WeightsError("is a zip file, but not one of PyTorch (no data.pkl)")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise WeightsError("was written on a big-endian machine")
        storages: dict[str, Storage] = {}
        value = load_pickle(io.BytesIO(archive.read(pickles[0])), path, storages)
        for key, storage in storages.items():
            entry = archive.getinfo(f"{root}data/{key}")
            if entry.file_size != storage.nbytes:
                expected = f"{storage.size} elements of {storage.dtype}"
                raise WeightsError(f"storage {key} has {entry.file_size} bytes, not {expected}")
            # The data follow a header of 30 bytes, the name, and what makes them aligned.
            file.seek(entry.header_offset + 26)
            storage.start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            storage.crc32 = entry.CRC
        is_script = any(name.startswith(f"{root}code/") for name in names)
    form = "TorchScript archive" if is_script else "torch.save, zip"
    return Contents(*find_tensors(value), form, (path,))


def _check_entries(archive: zipfile.ZipFile) -> None:
    """PyTorch stores entries uncompressed and without overlap; refuses others as possible bombs."""
    end = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise refused(f"entry {entry.filename} overlaps another")
        end = entry.header_offset + entry.compress_size
        is_code = "/code/" in entry.filename
        if entry.compress_type != zipfile.ZIP_STORED and not is_code:
            raise refused(f"entry {entry.filename} is compressed")
        if entry.filename.endswith("data.pkl") and entry.file_size > _MAX_PICKLE_BYTES:
            raise refused(f"a pickle of {entry.file_size} bytes")


class _Stream(io.BufferedReader):
    """A file of which no read asks for more than it has: a pickle may ask for any number."""

    def left(self) -> int:
        return max(0, os.fstat(self.fileno()).st_size - self.tell())

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self.left() if size is None or size < 0 else min(size, self.left()))


def _open_legacy(path: Path) -> Contents:
    """Magic, protocol, system info, content, storage keys, then the bytes of each storage."""
    with _Stream(path.open("rb", buffering=0)) as file:
        if any(load_pickle(file, path) != word for word in _LEGACY_START):
            raise WeightsError("is a pickle, but not of PyTorch")
        if not load_pickle(file, path).get("little_endian", True):
            raise WeightsError("was written on a big-endian machine")
        storages: dict[str, Storage] = {}
        value = load_pickle(file, path, storages)
        for key in load_pickle(file, path):
            size = int.from_bytes(file.read(8), "little")
            storage = storages.get(key)
            if storage is None or storage.size != size or storage.start >= 0:
                raise WeightsError(f"has a storage of {size} elements, which no tensor expects")
            storage.start = file.tell()
            if storage.nbytes > file.left():
                raise WeightsError(f"ends inside storage {key}")
            file.seek(storage.nbytes, os.SEEK_CUR)
        if missing := [key for key, storage in storages.items() if storage.start < 0]:
            raise WeightsError(f"lacks storage {missing[0]}")
        if left := file.left():
            raise WeightsError(f"has {left} bytes after its end")
    return Contents(*find_tensors(value), "torch.save, legacy", (path,))


# (how files begin, what opens them, or what else they are)
_KINDS: tuple[tuple[bytes, Callable[[Path], Contents] | str], ...] = (
    (rb"PK\x03\x04", _open_zip),
    (rb".{5}\0\0\0\{", _open_safetensors),
    (rb"\x80[\x02-\x05]", _open_legacy),
    (rb"version https://git-lfs", "a Git LFS pointer instead of the file; run `git lfs pull`"),
    (rb"\s*<(!doctype|html|\?xml)", "a web page instead of the file; download it again"),
    (rb"\x89HDF", "a Keras file of TensorFlow; get the safetensors file of the same model"),
    (rb"GGUF|GGML|ggml", "quantised, in the form of llama.cpp; get the float weights"),
    (rb"[\x80-\x8f\xde\xdf][\x00-\xff]{0,4}[\xa0-\xbf\xd9][a-z_]",
     "a msgpack file of Flax; get the safetensors or PyTorch file of the same model"),
    (rb"\x08[\x01-\x20][\x12:\x3a]", "an ONNX model; get the safetensors or PyTorch file of it"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc|Rar!", "a compressed archive; unpack it"),
    (rb"\{", "JSON: name the file of weights that it describes"),
)  # fmt: skip
