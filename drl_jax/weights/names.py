"""Parameter names: ours on one side, those of the reference's state dict on the other.

The reference uses OpenAI's names for the towers, with the prefix `clip.`, and its own names for the
heads, which each head translates (`reference_name`). Two differences are common to all: layers of a
transformer are stacked on a leading axis, and kernels are [in, out] where torch's are [out, in].
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.temporal import TEMPORAL_HEADS
from drl_jax.weights.tensors import Tensor

# (pattern of our path, the reference's name), applied in order; `{n}` stands for the layer.
_SUFFIXES = (
    (r"/resblocks/", "/resblocks/{n}/"),
    (r"/in_proj/kernel$", "/in_proj_weight"),
    (r"/in_proj/bias$", "/in_proj_bias"),
    (r"/(kernel|scale|embedding)$", "/weight"),
    (r"/", "."),
)
_ALIGNMENT = 64  # bytes
_HEADS = {"interaction": INTERACTIONS, "temporal": TEMPORAL_HEADS}


class Entry(NamedTuple):
    """One of our parameters and the tensors of the reference that hold it.

    Attributes:
      path: of our parameter, separated by "/".
      shape: of our parameter.
      names: of the reference's tensors, one for each layer.
      stacked: whether our parameter has a leading axis of layers.
    """

    path: str
    shape: tuple[int, ...]
    names: list[str]
    stacked: bool

    def from_reference(self, tensors: list[Any], dtype: np.dtype) -> np.ndarray:
        """The reference's tensors -> our parameter, without a copy of it in between.

        The array is aligned as JAX's own, so that a CPU device takes it over instead of copying it.
        """
        size = math.prod(self.shape) * dtype.itemsize
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        parameter = memory[start : start + size].view(dtype).reshape(self.shape)
        layers = parameter if self.stacked else [parameter]
        for layer, tensor in zip(layers, tensors, strict=True):
            out = layer.T if self.path.endswith("/kernel") else layer
            if self.path.endswith("conv1/kernel"):
                # [D, 3, p, p] -> [p*p*3, D], rows in the order of the pixels of a patch
                tensor = np.asarray(tensor).transpose(0, 2, 3, 1).reshape(out.shape)
            if isinstance(tensor, Tensor):
                tensor.copy_to(out)
            else:
                out[...] = tensor
        return parameter

    def to_reference(self, parameter: np.ndarray) -> list[np.ndarray]:
        """Our parameter -> the reference's tensors."""
        layers = list(parameter) if self.stacked else [parameter]
        return [_transposed_back(self.path, layer, self.shape) for layer in layers]

    def reference_shape(self) -> tuple[int, ...]:
        """Shape of each of the reference's tensors."""
        layer = np.broadcast_to(np.float32(0), self.shape[1:] if self.stacked else self.shape)
        return _transposed_back(self.path, layer, self.shape).shape


def entries(params: Any) -> Iterator[Entry]:
    """Yields an entry for each parameter of a (possibly abstract) nested dict, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}
    for path, leaf in paths.items():
        name = _reference_path(path, paths)
        for pattern, replacement in _SUFFIXES:
            name = re.sub(pattern, replacement, name)
        stacked = "{n}" in name
        layers = range(leaf.shape[0]) if stacked else range(1)
        yield Entry(path, tuple(leaf.shape), [name.format(n=n) for n in layers], stacked)


def _reference_path(path: str, paths: dict[str, Any]) -> str:
    """The path below the reference's names of the modules."""
    module, _, rest = path.partition("/")
    if module == "backbone":
        return f"clip/{rest}"
    siblings = {p.partition("/")[2] for p in paths if p.startswith(f"{module}/")}
    for head in _HEADS[module].values():
        if head is not None and (name := head.reference_name(rest, siblings)):
            return name
    raise KeyError(f"no head has a parameter {path}")


def _transposed_back(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if path.endswith("conv1/kernel"):
        patch = round((shape[0] / 3) ** 0.5)
        return array.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
    return array.T if path.endswith("/kernel") else array
