"""The pickles in PyTorch files, read without executing code in them.

A pickle is a program. This reader builds descriptions of tensors from an exact whitelist of
constructors, refuses everything else by name, and checks that every tensor is inside its storage.
"""

import collections
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import check_memo

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


class TorchFileError(UserError):
    """A file that is damaged, dangerous or of an unknown format."""


class _StorageType(NamedTuple):
    """Represents `torch.FloatStorage` and the other storage types."""

    dtype: np.dtype


class Storage(NamedTuple):
    """A named range of bytes in the file."""

    key: str
    dtype: np.dtype
    numel: int


class Tensor(NamedTuple):
    """A view of a storage that has not been read."""

    storage: Storage
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


# ---------------------------------------------------------------- unpickling


def load_pickle(file: Any) -> Any:
    """Unpickles the next object of a file in memory."""
    check_memo(file)
    return _Unpickler(file).load()


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

    def persistent_load(self, reference: Any) -> Storage:
        kind, storage_type, key, _, numel, *view = reference
        if kind not in ("storage", b"storage") or not isinstance(storage_type, _StorageType):
            raise TorchFileError(f"refused: unknown reference {kind!r}")
        if any(view):
            raise TorchFileError("refused: a view of a storage")
        if type(key) is not str or type(numel) is not int or numel < 0:
            raise TorchFileError(f"refused: storage {key!r} of {numel!r} elements")
        return Storage(key, storage_type.dtype, numel)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`, with every bound checked."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or len(size) != len(stride):
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
    return Tensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_CONSTRUCTORS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def named_tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of nested dicts and modules; names are joined by dots.

    The state dict of a training checkpoint is unwrapped first.
    """
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    seen: set[int] = set()
    stack = [("", value)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor):
            yield name, value
            continue
        children = value.attributes if isinstance(value, _Module) else value
        if not isinstance(children, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        named = [(f"{name}.{key}" if name else str(key), child) for key, child in children.items()]
        stack.extend(reversed(named))
