"""Parameter names: ours on one side, those of the reference's state dict on the other.

The reference uses OpenAI's names for the towers, with the prefix `clip.`, and its own names for the
heads, which each head translates (`reference_name`); heads that it does not have keep ours. Two
differences are common to all: layers of a transformer are stacked on a leading axis, and kernels
are [in, out] where torch's are [out, in].
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.temporal import TEMPORAL_HEADS

# (pattern of our path, the reference's name), applied in order; `{n}` stands for the layer.
_SUFFIXES = (
    (r"/resblocks/", "/resblocks/{n}/"),
    (r"/in_proj/kernel$", "/in_proj_weight"),
    (r"/in_proj/bias$", "/in_proj_bias"),
    (r"/(kernel|scale|embedding)$", "/weight"),
    (r"/", "."),
)
_HEADS = {"interaction": INTERACTIONS, "temporal": TEMPORAL_HEADS}


class Entry(NamedTuple):
    """One of our parameters and the tensors of the reference that hold it."""

    path: str  # of our parameter, separated by "/"
    shape: tuple[int, ...]  # of our parameter
    names: list[str]  # of the reference's tensors, one for each layer
    stacked: bool  # whether our parameter has a leading axis of layers

    def tensors_in(self, parameter: np.ndarray) -> list[np.ndarray]:
        """The reference's tensors as views of our parameter: to read them, or to fill it."""
        layers = list(parameter) if self.stacked else [parameter]
        if self.path.startswith("backbone/") and self.path.endswith("conv1/kernel"):
            # [p*p*3, D], rows in the order of the pixels of a patch -> [D, 3, p, p]
            patch = round((self.shape[0] / 3) ** 0.5)
            return [x.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1) for x in layers]
        return [layer.T for layer in layers] if self.path.endswith("/kernel") else layers

    def reference_shape(self) -> tuple[int, ...]:
        """Shape of each of the reference's tensors."""
        return self.tensors_in(np.broadcast_to(np.float32(0), self.shape))[0].shape


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
    for head in filter(None, _HEADS[module].values()):
        if name := head.reference_name(rest, siblings):
            return name
    return path.replace("/", ".")  # Of a head that the reference does not have.


def state_dict_from_params(params: Any) -> dict[str, np.ndarray]:
    """Parameters -> the reference's state dict, contiguous arrays of the same dtype."""
    return {
        name: np.ascontiguousarray(tensor) if tensor.ndim else tensor
        for entry, leaf in zip(entries(params), jax.tree.leaves(params), strict=True)
        for name, tensor in zip(entry.names, entry.tensors_in(np.asarray(leaf)), strict=True)
    }
