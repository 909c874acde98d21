"""Reads PyTorch files without PyTorch and without executing code in them.

A `.pt` or `.bin` file is a pickle, that is, a program. This reader supports four formats (the
TorchScript archives that OpenAI published, `torch.save` as zip and as the older stream, and Hugging
Face's safetensors). It builds tensors from an exact whitelist of constructors, refuses everything
else by name, and checks that every tensor is inside its storage before it reads it.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from drl_jax.runtime.errors import UserError

StateDict = dict[str, np.ndarray]

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# The first number of a legacy file, and the protocol that follows it.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 256 * 2**20


class TorchFileError(UserError):
    """A file that is damaged, dangerous or of an unknown format."""


class _StorageType(NamedTuple):
    """Represents `torch.FloatStorage` and the other storage types."""

    dtype: np.dtype


class _Storage(NamedTuple):
    """A named range of bytes in the file."""

    key: str
    dtype: np.dtype
    numel: int


class _Tensor(NamedTuple):
    """A view of a storage that has not been read."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Module:
    """A TorchScript object: its attributes without its code."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


def read_torch_file(path: Path) -> StateDict:
    """Reads the tensors of a file by name.

    Args:
      path: a TorchScript archive, a `torch.save` file (zip or legacy) that holds a dict of tensors,
        or a safetensors file.

    Returns:
      Arrays with the dtypes of the file (bfloat16 from ml_dtypes), in the order of the file.
      Tensors that share storage are copied.

    Raises:
      TorchFileError: the file cannot be read safely and completely; no code in it was executed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise TorchFileError(f"cannot read {path}: {error.strerror}") from error
    try:
        if start[:4] == b"PK\x03\x04":
            return _read_zip(path)
        if path.suffix == ".safetensors":
            return safetensors.numpy.load_file(path)
        return _read_legacy(path)
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error
    except safetensors.SafetensorError as error:
        raise TorchFileError(f"{path} is not a complete safetensors file ({error})") from error
    # The standard library raises many types of errors for damaged pickles and archives.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise TorchFileError(
            f"{path} is damaged, or not a PyTorch or safetensors file ({reason})"
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file that `read_torch_file` can read; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


# ---------------------------------------------------------------- restricted pickle


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if module.split(".")[0] == "__torch__":
            return _Module
        try:
            return _CONSTRUCTORS[module, name]
        except KeyError:
            raise TorchFileError(
                f"refused: the file asks for {module}.{name}, which a state dict does not need"
            ) from None

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage_type, key, _, numel, *view = reference
        if kind not in ("storage", b"storage") or not isinstance(storage_type, _StorageType):
            raise TorchFileError(f"refused: unknown reference {kind!r}")
        if any(view):
            raise TorchFileError("refused: a view of a storage")
        if type(key) is not str or type(numel) is not int or numel < 0:
            raise TorchFileError(f"refused: storage {key!r} of {numel!r} elements")
        return _Storage(key, storage_type.dtype, numel)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    """`torch._utils._rebuild_tensor_v2`, with every bound checked."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or len(size) != len(stride):
        raise TorchFileError("refused: a tensor without storage or with odd strides")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise TorchFileError(f"refused: a tensor of size {size}, stride {stride}, offset {offset}")
    if math.prod(size):
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= storage.numel:
            raise TorchFileError(
                f"refused: a tensor of size {tuple(size)} reaches element {last} of a storage of"
                f" {storage.numel}"
            )
        # A view with overlapping elements can be larger than the file: a memory bomb.
        if math.prod(size) > storage.numel:
            raise TorchFileError(
                f"refused: a tensor of size {tuple(size)} overlaps itself in a storage of"
                f" {storage.numel} elements"
            )
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_CONSTRUCTORS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _named_tensors(value: Any) -> Iterator[tuple[str, _Tensor]]:
    """Yields the tensors of nested dicts and modules; names are joined by dots.

    The state dict of a training checkpoint is unwrapped first.
    """
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    seen: set[int] = set()
    stack = [("", value)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, _Tensor):
            yield name, value
            continue
        children = value.attributes if isinstance(value, _Module) else value
        if not isinstance(children, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        named = [(f"{name}.{key}" if name else str(key), child) for key, child in children.items()]
        stack.extend(reversed(named))


def _materialise(tensor: _Tensor, data: bytes | memoryview) -> np.ndarray:
    """Reads the values of a tensor from the bytes of its storage."""
    flat = np.frombuffer(data, tensor.storage.dtype)
    itemsize = tensor.storage.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], tensor.size, [step * itemsize for step in tensor.stride]
    )
    # np.ascontiguousarray would turn a scalar into a vector.
    return view.copy()


# ---------------------------------------------------------------- zip format


def _read_zip(path: Path) -> StateDict:
    with zipfile.ZipFile(path) as archive:
        _check_entries(archive)
        pickles = [e for e in archive.namelist() if e.endswith("/data.pkl") and e.count("/") == 1]
        if len(pickles) != 1:
            raise TorchFileError("is a zip file, but not one of PyTorch (no data.pkl)")
        root = pickles[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise TorchFileError("was written on a big-endian machine")
        content = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
        storages: dict[_Storage, bytes] = {}
        tensors = {}
        for name, tensor in _named_tensors(content):
            storage = tensor.storage
            if storage not in storages:
                entry = archive.getinfo(f"{root}data/{storage.key}")
                if entry.file_size != storage.numel * storage.dtype.itemsize:
                    raise TorchFileError(
                        f"storage {storage.key} has {entry.file_size} bytes, not"
                        f" {storage.numel} elements of {storage.dtype}"
                    )
                storages[storage] = archive.read(entry)  # zipfile checks its CRC
            tensors[name] = _materialise(tensor, storages[storage])
    return tensors


def _check_entries(archive: zipfile.ZipFile) -> None:
    """PyTorch stores entries uncompressed and without overlap; refuses others as possible bombs."""
    end = 0
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise TorchFileError(f"refused: entry {entry.filename} overlaps another")
        end = entry.header_offset + entry.compress_size
        is_code = "/code/" in entry.filename
        if entry.compress_type != zipfile.ZIP_STORED and not is_code:
            raise TorchFileError(f"refused: entry {entry.filename} is compressed")
        if entry.filename.endswith("data.pkl") and entry.file_size > _MAX_PICKLE_BYTES:
            raise TorchFileError(f"refused: a pickle of {entry.file_size} bytes")


# ---------------------------------------------------------------- legacy format


def _read_legacy(path: Path) -> StateDict:
    """Reads magic, protocol, system info, content, storage keys, then the bytes of each storage."""
    with path.open("rb") as file:

        def load() -> Any:
            return _Unpickler(file).load()

        if load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
            raise TorchFileError("is not a PyTorch file")
        if not load().get("little_endian", True):
            raise TorchFileError("was written on a big-endian machine")
        tensors = dict(_named_tensors(load()))
        dtypes = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
        data = {}
        for key in load():
            numel = int.from_bytes(file.read(8), "little")
            storage = dtypes.get(key)
            if storage is None or storage.numel != numel:
                raise TorchFileError(f"storage {key} has {numel} elements, which no tensor expects")
            data[key] = file.read(numel * storage.dtype.itemsize)
            if len(data[key]) != numel * storage.dtype.itemsize:
                raise TorchFileError(f"ends inside storage {key}")
        missing = dtypes.keys() - data.keys()
        if missing:
            raise TorchFileError(f"lacks storage {min(missing)}")
    return {name: _materialise(t, data[t.storage.key]) for name, t in tensors.items()}
