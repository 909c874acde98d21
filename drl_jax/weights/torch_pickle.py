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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from drl_jax.runtime.files import check_memo
from drl_jax.weights.errors import WeightsError, refused
from drl_jax.weights.tensors import Sealed, Storage, Tensor

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
_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's names, in old files.
_PARTS = ("_modules", "_parameters", "_buffers")  # Attributes of a module.


class _Inert:
    """A value of a class that is not imported: its name and its attributes, without its code."""

    name = ""
    attributes: dict[Any, Any]

    def __new__(cls, *arguments: Any, **named: Any) -> "_Inert":
        value = super().__new__(cls)
        value.attributes = {}
        return value

    def __call__(self, *arguments: Any, **named: Any) -> "_Inert":
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
def _inert(name: str) -> type[_Inert]:
    return type("Inert", (_Inert,), {"name": name})


def load_pickle(file: Any, path: Path, storages: dict[str, Storage] | None = None) -> Any:
    """Unpickles the next object of a file, and adds all storages that it names, by key."""
    check_memo(file)
    return _Unpickler(file, path, {} if storages is None else storages).load()


class _Tuple(tuple):
    """Hashed by identity: to hash nested tuples, as keys of a dict, could crash or never end."""

    __hash__, __eq__ = object.__hash__, object.__eq__


def _with_tuple(load: Callable) -> Callable:
    def load_tuple(unpickler: Any) -> None:
        load(unpickler)
        unpickler.stack[-1] = _Tuple(unpickler.stack[-1])

    return load_tuple


class _Unpickler(pickle._Unpickler):
    # Python's own, since the one in C makes no other tuples.
    dispatch = pickle._Unpickler.dispatch | {
        opcode[0]: _with_tuple(pickle._Unpickler.dispatch[opcode[0]])
        for opcode in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
    }

    def __init__(self, file: Any, path: Path, storages: dict[str, Storage]):
        super().__init__(file)
        self.path, self.storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        module = _MODULES.get(module, module)
        kind, top = name.removesuffix("Storage"), module.split(".")[0]
        if top == "__torch__":
            return _inert(module)
        if module in ("torch", "torch.storage") and kind != name and kind in _DTYPES:
            return kind
        if (module, name) in _CONSTRUCTORS:
            return _CONSTRUCTORS[module, name]
        parts = {top, *name.split(".")[:-1]}
        if any(re.fullmatch(_ATTACKS.get(part, "(?!)"), name.split(".")[-1]) for part in parts):
            raise refused(f"it asks for {module}.{name}, which a state dict does not need")
        return _inert(f"{module}.{name}")

    def persistent_load(self, reference: Any) -> Any:
        if len(reference) == 4 and reference[0] == "module":
            return reference[1]  # Of a whole model: its class and source code.
        word, kind, key, _, size, *view = reference
        if word not in ("storage", b"storage") or not (isinstance(kind, type) or kind in _DTYPES):
            raise refused("an unknown reference")
        if isinstance(kind, type):
            return kind()  # Of elements that NumPy does not have.
        if any(view):
            raise refused("a view of a storage")
        if type(key) is not str or type(size) is not int or size < 0:
            raise refused("a storage without a name and a number of elements")
        dtype = np.dtype(_DTYPES[kind])
        storage = self.storages.setdefault(key, Storage(self.path, dtype, size))
        if (storage.dtype, storage.size) != (dtype, size):
            raise refused(f"storage {key} has two sizes or types")
        return storage


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
    """`torch._utils._rebuild_tensor_v2`, with every bound checked."""
    if isinstance(storage, _Inert):
        return _inert(f"torch._utils._rebuild_tensor of {storage.name}")()
    if len(more) > 2 and more[2]:  # Conjugated or negated when it is read.
        return _inert("torch._utils._rebuild_tensor with metadata")()
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > _MAX_AXES:
        raise refused("a tensor without storage or with odd strides")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise refused("a tensor whose size, stride or offset is no usual number")
    if math.prod(size):
        what, held = f"a tensor of size {tuple(size)}", storage.size
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= held:
            raise refused(f"{what} reaches element {last} of a storage of {held}")
        # A view with overlapping elements can be larger than the file: a memory bomb.
        if math.prod(size) > held:
            raise refused(f"{what} overlaps itself in a storage of {held} elements")
    return Tensor(storage, size, offset, stride)


class _Constructor(Sealed):
    """A function that a pickle may call."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


_CONSTRUCTORS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): _Constructor(_Tuple),
    ("torch._utils", "_rebuild_tensor_v2"): _Constructor(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Constructor(lambda data, *_: data),
    ("torch._utils", "_rebuild_parameter_with_state"): _Constructor(lambda data, *_: data),
}


def find_tensors(value: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of nested dicts and modules, and the classes of other values, by dotted names."""
    tensors: dict[str, Tensor] = {}
    inert: dict[str, str] = {}
    stack, seen = [("", value)], set()
    while stack:
        name, value = stack.pop()
        if len(name) > _MAX_NAME:
            raise refused(f"a name of more than {_MAX_NAME} characters")
        if isinstance(value, Tensor) and name in tensors:
            raise WeightsError(f"has two tensors with the name {name}")
        if isinstance(value, Tensor):
            tensors[name] = value
            continue
        children = value
        if isinstance(value, _Inert):
            children = value.attributes
            if not value.name.startswith("__torch__"):
                inert[name] = value.name
        if isinstance(children, dict) and id(value) not in seen:
            seen.add(id(value))
            # Other keys may be large, and hold nothing of a model.
            for key in reversed([key for key in children if isinstance(key, str | int)]):
                below = f"{name}.{key}" if name else str(key)
                stack.append((name if key in _PARTS else below, children[key]))
    return tensors, inert
