"""How arrays lie on devices: one mesh over all of them, axis `data`, and the layouts used on it.

Batches and similarity rows are split over the mesh. Parameters (with what the optimiser keeps of
them) are whole on every device, or split too (`fsdp`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
# What has fewer elements than this is cheaper to copy than to gather.
_MIN_SPLIT_ELEMENTS = 2**12


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layouts of a program on a mesh.

    Attributes:
      mesh: all devices on the axis `data`.
      fsdp: whether parameters are split over the devices.
    """

    mesh: Mesh
    fsdp: bool = False

    @property
    def devices(self) -> int:
        return self.mesh.devices.size

    @property
    def rows(self) -> NamedSharding:
        """The first axis split over the devices, the rest whole: batches, similarity rows."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    @property
    def whole(self) -> NamedSharding:
        """A copy on every device: parameters, gathered features."""
        return NamedSharding(self.mesh, PartitionSpec())

    def parameter(self, shape: Sequence[int]) -> NamedSharding:
        """Layout of a parameter, and of its moments in the optimiser, by its shape alone.

        Under `fsdp` the longest axis that the devices divide is split; small parameters, and those
        without such an axis, are whole.
        """
        axes = [axis for axis, size in enumerate(shape) if size % self.devices == 0]
        if not self.fsdp or not axes or math.prod(shape) < _MIN_SPLIT_ELEMENTS:
            return self.whole
        axis = max(axes, key=lambda axis: shape[axis])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))

    def parameters(self, tree: Any) -> Any:
        """`parameter` of each leaf of a tree of arrays or shapes."""
        return jax.tree.map(lambda leaf: self.parameter(leaf.shape), tree)

    def local_rows(self, rows: int) -> slice:
        """Which rows of a global batch of `rows` lie on this process's devices."""
        own = self.rows.addressable_devices_indices_map((rows,)).values()
        ranges = [index[0].indices(rows) for index in own]
        return slice(min(start for start, _, _ in ranges), max(stop for _, stop, _ in ranges))

    def put_rows(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on its devices; the result is the global batch."""
        return {
            name: jax.make_array_from_process_local_data(self.rows, array)
            for name, array in batch.items()
        }


def make_layout(devices: Sequence[jax.Device] | None = None, *, fsdp: bool = False) -> Layout:
    """A mesh over the given devices, or over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    # Auto axes (the default is Explicit now, under which the token-wise product, both operands
    # split on `data`, is an error rather than a choice of layout).
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    return Layout(mesh, fsdp)


def map_row_chunks(
    function: Callable[[Any], Any], arrays: Any, *, chunk: int, layout: Layout
) -> Any:
    """`function(arrays)`, computed over chunks of rows one after another to save memory.

    The backward pass runs each chunk again instead of keeping what it needs, so memory is that of
    one chunk, and the gradient is exact. Each chunk takes its rows from all devices alike, so that
    none of them moves and none idles.

    Args:
      function: of arrays with C rows, to arrays with C rows; each row depends on that row alone.
      arrays: tree of [B, ...] arrays, split over the devices by rows.
      chunk: C, over all devices; the devices divide it, and it divides B.
      layout: of the rows.

    Returns:
      What `function` returns for all B rows, split over the devices by rows.
    """
    devices = layout.devices
    chunks = NamedSharding(layout.mesh, PartitionSpec(None, AXIS))

    # A device has its rows together: [devices, chunks, rows of a chunk] -> chunks first.
    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(devices, -1, chunk // devices, *x.shape[1:]).swapaxes(0, 1)
        return with_sharding_constraint(x.reshape(-1, chunk, *x.shape[3:]), chunks)

    def join(y: jax.Array) -> jax.Array:
        y = y.reshape(-1, devices, chunk // devices, *y.shape[2:]).swapaxes(0, 1)
        return with_sharding_constraint(y.reshape(-1, *y.shape[3:]), layout.rows)

    results = jax.lax.map(jax.checkpoint(function), jax.tree.map(split, arrays))
    return jax.tree.map(join, results)
