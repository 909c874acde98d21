"""Checksums of arrays, computed on the devices that hold them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drl_jax.runtime.files import json_sha256


class ArraySummary(NamedTuple):
    """What a checkpoint records of an array.

    Attributes:
      shape: its shape.
      dtype: name of its dtype.
      checksum: 32 bits of all its elements and their places, as a whole number.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: int


def summarise(tree: Any) -> tuple[dict[str, ArraySummary], list[str]]:
    """Computes a checksum of every array of a tree, and looks for values that are not finite.

    A change of one element always changes the checksum of its array; any other change leaves it
    the same with a probability of 2^-32. It does not depend on shardings. With arrays that are
    split over several processes, all of them must call this.

    Args:
      tree: arrays of 8, 16 or 32 bits an element, on the devices.

    Returns:
      The summary of each array by its path in the tree, and the paths of the arrays that hold a
      NaN or an infinity.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    # All are started before the first one is waited for.
    results = {name: _summary(leaf) for name, leaf in leaves.items()}
    # The copy of this process: with a replicated array, another process may have another one.
    numbers = {name: np.asarray(x.addressable_data(0)) for name, x in results.items()}
    summaries = {
        name: ArraySummary(tuple(leaf.shape), leaf.dtype.name, int(numbers[name][0]))
        for name, leaf in leaves.items()
    }
    return summaries, [name for name, (_, bad) in numbers.items() if bad]


def digest(summaries: Mapping[str, ArraySummary]) -> str:
    """Hexadecimal SHA-256 of the paths, shapes, dtypes and checksums of arrays."""
    return json_sha256({name: list(summary) for name, summary in summaries.items()})


def params_digest(params: Any) -> str:
    """`digest` of a tree of arrays; as for `summarise`, all processes call it."""
    return digest(summarise(params)[0])


def path_name(path: tuple) -> str:
    """Name of a leaf of a tree of dicts and (named) tuples, e.g. `0/mu/backbone/logit_scale`."""
    return "/".join(
        str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))
        for entry in path
    )


@jax.jit
def _summary(array: jax.Array) -> jax.Array:
    """uint32 [2]: the sum of the mixed elements, and whether a value is not finite."""
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = array if array.dtype == bool else jax.lax.bitcast_convert_type(array, unsigned)
    # The index of each element in the whole array, so that moved elements are noticed.
    index = jnp.zeros(array.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(array.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * np.uint32(stride % 2**32)
        stride *= array.shape[axis]
    # A bijection of 32 bits (an xor-multiply hash): another element gives another number. A sum can
    # be reduced in any order, on any number of devices.
    mixed = bits.astype(jnp.uint32) ^ (index * np.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x846CA68B)
    mixed ^= mixed >> 16
    floating = jnp.issubdtype(array.dtype, jnp.inexact)
    bad = ~jnp.isfinite(array) if floating else jnp.zeros(array.shape, bool)
    if array.ndim > 1 and array.size > _LARGE:
        mixed, bad = _reduce_rows(mixed, bad)
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.any(bad).astype(jnp.uint32)])


# Elements above which two reductions are faster than one.
_LARGE = 2**16


def _reduce_rows(mixed: jax.Array, bad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds up groups of at most 32 rows, elementwise.

    XLA's CPU backend vectorises this and splits it over threads, but not the reduction of a whole
    array: it is several times as fast.
    """
    rows = mixed.shape[0]
    group = max(size for size in range(1, 33) if rows % size == 0)
    shape = (rows // group, group, *mixed.shape[1:])
    reduced = jax.lax.reduce(
        (mixed.reshape(shape), bad.reshape(shape)),
        (np.uint32(0), np.bool_(False)),
        lambda a, b: (a[0] + b[0], a[1] | b[1]),
        (1,),
    )
    # Otherwise XLA merges this reduction with the next one.
    return jax.lax.optimization_barrier(tuple(reduced))
