"""Writes files of PyTorch without PyTorch, also such as PyTorch would not write."""

import collections
import io
import pickle
import struct
import zipfile

import numpy as np


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Global:
    """A name that the file asks for, pickled without importing it."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Pickler(pickle._Pickler):
    """Writes Globals by name and Storages as torch does."""

    def save(self, obj, **kwargs):
        if isinstance(obj, Global):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, **kwargs)

    def persistent_id(self, obj):
        return obj.reference if isinstance(obj, Storage) else None

    def save_reduce(self, func, args, state=None, *rest, **kwargs):
        if isinstance(func, Global):
            self.save(func)
            self.save(args)
            self.write(pickle.REDUCE)
            if state is not None:
                self.save(state)
                self.write(pickle.BUILD)
        else:
            super().save_reduce(func, args, state, *rest, **kwargs)


class Storage:
    def __init__(self, numel, key="0", kind="FloatStorage"):
        self.reference = ("storage", Global("torch", kind), key, "cpu", numel)


def tensor(numel=6, offset=0, size=(2, 3), stride=(3, 1)):
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, Storage(numel), offset, size, stride, False, collections.OrderedDict())


def write_zip(path, content, storages=None, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", file.getvalue())
        for key, data in enumerate(
            [struct.pack("<6f", *range(6))] if storages is None else storages
        ):
            archive.writestr(f"archive/data/{key}", data)


def stored(arrays: dict[str, np.ndarray], storages: list[bytes]) -> dict[str, Call]:
    """Float32 arrays as tensors, each in a storage of its own, whose bytes are appended."""
    tensors = {}
    for name, array in arrays.items():
        storage = Storage(array.size, str(len(storages)))
        storages.append(array.tobytes())
        strides = tuple(stride // 4 for stride in array.strides)
        rebuild = Global("torch._utils", "_rebuild_tensor_v2")
        view = (storage, 0, array.shape, strides, False, collections.OrderedDict())
        tensors[name] = Call(rebuild, *view)
    return tensors


def write(path, content, storages: list[bytes], *, is_legacy: bool = False) -> None:
    """A file of `torch.save`: a zip archive, or the older stream."""
    if not is_legacy:
        write_zip(path, content, storages)
        return
    keys = [str(key) for key in range(len(storages))]
    with path.open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, content, keys):
            Pickler(file, 2).dump(value)
        for data in storages:
            file.write(struct.pack("<q", len(data) // 4) + data)
