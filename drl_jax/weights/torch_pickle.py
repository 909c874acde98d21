"""The pickles in PyTorch files, read without executing code in them.

A pickle is a program. This reader calls an exact list of constructors, which describe tensors. Any
other class or function becomes an inert object, which remembers its name and what is assigned to
it; what only an attack needs is refused.
"""

import collections
import functools
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from drl_jax.runtime.files import check_memo
from drl_jax.weights.errors import refused

# PyTorch's names of types of elements, with and without "Storage".
_DTYPES = {
    **{"Double": np.float64, "Float": np.float32, "Half": np.float16},
    **{"BFloat16": ml_dtypes.bfloat16, "Long": np.int64, "Int": np.int32, "Short": np.int16},
    **{"Char": np.int8, "Byte": np.uint8, "Bool": np.bool_},
    # Of any type: PyTorch's newer form, in which the tensor has it.
    "Untyped": np.uint8,
}
# Patterns of functions that only an attack needs. Nothing is called in any case; these are refused
# so that whoever opens such a file hears of it.
_ATTACKS = {
    **dict.fromkeys(("os", "posix", "nt", "subprocess", "sys", "importlib", "runpy"), ".*"),
    **dict.fromkeys(("ctypes", "socket", "shutil", "pty", "code", "pickle", "marshal"), ".*"),
    "builtins": "eval|exec|compile|open|__import__|input|breakpoint|globals|[sd][et][tl]attr",
    "torch": "load|hub.*",
}
_MAX_AXES, _MAX_NAME = 32, 1000
# Python 2's names, in old files.
_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class _StorageType(NamedTuple):
    """Represents `torch.FloatStorage` and the other storage types."""

    dtype: np.dtype


class Storage(NamedTuple):
    """A named range of bytes in the file."""

    key: str
    dtype: np.dtype
    numel: int


class View(NamedTuple):
    """A tensor: a view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """A value of a class that is not imported: its name and its attributes, without its code."""

    name = ""

    attributes: dict[Any, Any]

    def __new__(cls, *arguments: Any, **named: Any) -> "Inert":
        value = super().__new__(cls)
        value.attributes = {}
        return value

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **named: Any) -> "Inert":
        return self

    def __setstate__(self, state: Any) -> None:
        state = state[0] if isinstance(state, tuple) and state else state
        if isinstance(state, dict):
            self.attributes.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.attributes[key] = value

    def extend(self, values: Any) -> None:
        """Forgets elements of a list, or of a set."""

    append = add = extend


@functools.lru_cache(maxsize=4096)
def _inert(name: str) -> type[Inert]:
    return type("Inert", (Inert,), {"name": name})


# ---------------------------------------------------------------- unpickling


def load_pickle(file: Any, storages: dict[str, Storage] | None = None) -> Any:
    """Unpickles the next object of a file in memory; adds all storages that it names by key."""
    check_memo(file)
    return _Unpickler(file, {} if storages is None else storages).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, storages: dict[str, Storage]):
        super().__init__(file)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        module = _MODULES.get(module, module)
        kind, top = name.removesuffix("Storage"), module.split(".")[0]
        if top == "__torch__":
            return _inert(module)
        if module in ("torch", "torch.storage") and kind != name and kind in _DTYPES:
            return _StorageType(np.dtype(_DTYPES[kind]))
        if (module, name) in _CONSTRUCTORS:
            return _CONSTRUCTORS[module, name]
        parts = {top, *name.split(".")[:-1]}
        if any(re.fullmatch(_ATTACKS.get(part, "(?!)"), name.split(".")[-1]) for part in parts):
            raise refused(f"it asks for {module}.{name}, which a state dict does not need")
        return _inert(f"{module}.{name}")

    def persistent_load(self, reference: Any) -> Any:
        if len(reference) == 4 and reference[0] == "module":
            return reference[1]  # Of a whole model: its class and source code.
        kind, storage_type, key, _, numel, *view = reference
        if kind in ("storage", b"storage") and isinstance(storage_type, type):
            return storage_type()  # Of elements that NumPy does not have.
        if kind not in ("storage", b"storage") or not isinstance(storage_type, _StorageType):
            raise refused("an unknown reference")
        if any(view):
            raise refused("a view of a storage")
        if type(key) is not str or type(numel) is not int or numel < 0:
            raise refused("a storage without a name and a number of elements")
        storage = Storage(key, storage_type.dtype, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise refused(f"storage {key} has two sizes or types")
        return storage


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> View | Inert:
    """`torch._utils._rebuild_tensor_v2`, with every bound checked."""
    if isinstance(storage, Inert):
        return _inert(f"torch._utils._rebuild_tensor of {storage.name}")()
    if len(more) > 2 and more[2]:  # Conjugated or negated when it is read.
        return _inert("torch._utils._rebuild_tensor with metadata")()
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > _MAX_AXES:
        raise refused("a tensor without storage or with odd strides")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise refused("a tensor whose size, stride or offset is no usual number")
    if math.prod(size):
        what, numel = f"a tensor of size {tuple(size)}", storage.numel
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= numel:
            raise refused(f"{what} reaches element {last} of a storage of {numel}")
        # A view with overlapping elements can be larger than the file: a memory bomb.
        if math.prod(size) > numel:
            raise refused(f"{what} overlaps itself in a storage of {numel} elements")
    return View(storage, offset, tuple(size), tuple(stride))


class _Constructor:
    """A function that a pickle may call, and not change."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise refused("a state for a function")


_CONSTRUCTORS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): _Constructor(lambda values=(): tuple(values)),
    ("torch._utils", "_rebuild_tensor_v2"): _Constructor(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Constructor(lambda data, *_: data),
    ("torch._utils", "_rebuild_parameter_with_state"): _Constructor(lambda data, *_: data),
}


def named_values(value: Any) -> Iterator[tuple[str, View | Inert]]:
    """Yields the tensors of nested dicts and modules, and inert values; dots join the names."""
    seen: set[int] = set()
    stack = [("", value)]
    while stack:
        name, value = stack.pop()
        if len(name) > _MAX_NAME:
            raise refused(f"a name of more than {_MAX_NAME} characters")
        if isinstance(value, View):
            yield name, value
            continue
        children = value
        if isinstance(value, Inert):
            children = value.attributes
            if not value.name.startswith("__torch__"):
                yield name, value
        if not isinstance(children, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        # Other keys may be large, and hold nothing of a model.
        pairs = [(key, child) for key, child in children.items() if isinstance(key, str | int)]
        start = f"{name}." if name else ""
        stack.extend((f"{start}{key}", child) for key, child in reversed(pairs))
