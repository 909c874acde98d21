"""Reads PyTorch files without PyTorch and without executing code in them.

A `.pt` or `.bin` file is a pickle, that is, a program. This reader supports four formats (the
TorchScript archives that OpenAI published, `torch.save` as zip and as the older stream, and Hugging
Face's safetensors). It builds tensors from an exact whitelist of constructors, refuses everything
else by name, and checks that every tensor is inside its storage before it reads it.
"""

import io
import mmap
import zipfile
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from drl_jax.runtime.errors import Unavailable, one_line, raise_if_refused
from drl_jax.weights.torch_pickle import (
    Storage,
    Tensor,
    TorchFileError,
    load_pickle,
    named_tensors,
)

StateDict = dict[str, np.ndarray]

# The first number of a legacy file, and the protocol that follows it.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 256 * 2**20


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
      Unavailable: there is no such file, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise Unavailable(path, error) from error
    try:
        if start[:4] == b"PK\x03\x04":
            return _read_zip(path)
        if path.suffix == ".safetensors":
            _refuse_eight_bits(path)
            return safetensors.numpy.load_file(path)
        return _read_legacy(path)
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error
    except safetensors.SafetensorError as error:
        raise TorchFileError(f"{path} is not a complete safetensors file ({error})") from error
    # The standard library raises many types of errors for damaged pickles and archives.
    except Exception as error:
        raise_if_refused(path, error)
        reason = one_line(error)
        raise TorchFileError(
            f"{path} is damaged, or not a PyTorch or safetensors file ({reason})"
        ) from error


def _refuse_eight_bits(path: Path) -> None:
    """NumPy has no floating-point numbers of 8 bits, in which quantised weights are stored."""
    with safetensors.safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            if (dtype := file.get_slice(name).get_dtype()).startswith("F8"):
                raise TorchFileError(f"is quantised: {name} is {dtype}; get the float weights")


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file that `read_torch_file` can read; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def _materialise(tensor: Tensor, data: bytes | memoryview) -> np.ndarray:
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
        content = load_pickle(io.BytesIO(archive.read(pickles[0])))
        storages: dict[Storage, bytes] = {}
        tensors = {}
        for name, tensor in named_tensors(content):
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
    # In memory, a read is never longer than the file.
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if load_pickle(file) != _LEGACY_MAGIC or load_pickle(file) != _LEGACY_PROTOCOL:
            raise TorchFileError("is not a PyTorch file")
        if not load_pickle(file).get("little_endian", True):
            raise TorchFileError("was written on a big-endian machine")
        tensors = dict(named_tensors(load_pickle(file)))
        dtypes = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
        data = {}
        for key in load_pickle(file):
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
        if left := len(file) - file.tell():
            raise TorchFileError(f"has {left} bytes after its end")
    return {name: _materialise(t, data[t.storage.key]) for name, t in tensors.items()}
