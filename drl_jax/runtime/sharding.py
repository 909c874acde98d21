"""Device mesh and array shardings.

One mesh over all devices with the axis `data`. Batches and the rows of the similarity matrix are
split over it. Parameters and optimiser state are replicated, or split too (`fsdp`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
    use_abstract_mesh,
)

AXIS = "data"
# Arrays with fewer elements are cheaper to replicate than to gather.
_MIN_SPLIT_ELEMENTS = 2**12


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shardings of a program on a mesh of all devices on the axis `data`.

    With `fsdp`, parameters are split over the devices.
    """

    mesh: Mesh
    fsdp: bool = False

    @property
    def device_count(self) -> int:
        return self.mesh.devices.size

    @property
    def batch_sharded(self) -> NamedSharding:
        """First axis split over the devices: batches, rows of the similarity matrix."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    @property
    def replicated(self) -> NamedSharding:
        """A copy on every device: parameters, gathered features."""
        return NamedSharding(self.mesh, PartitionSpec())

    def parameter(self, shape: Sequence[int]) -> NamedSharding:
        """Sharding of a parameter, and of its optimiser moments, from its shape.

        With `fsdp`, splits the longest axis that is divisible by the number of devices. Small
        parameters and those without such an axis are replicated.
        """
        axes = [axis for axis, size in enumerate(shape) if size % self.device_count == 0]
        if not self.fsdp or not axes or math.prod(shape) < _MIN_SPLIT_ELEMENTS:
            return self.replicated
        axis = max(axes, key=lambda axis: shape[axis])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))

    def parameters(self, tree: Any) -> Any:
        """`parameter` of each leaf of a tree of arrays or shapes."""
        return jax.tree.map(lambda leaf: self.parameter(leaf.shape), tree)

    def abstract(self, tree: Any) -> Any:
        """Shapes and dtypes of a tree of parameters, with their shardings."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.parameter(x.shape)), tree
        )

    def on_mesh(self, function: Callable, dtype: str) -> Callable:
        """A function that is traced with the mesh as the current one, and the products of a dtype.

        Every program of a model needs it. `attend` takes the kind of the devices from the mesh, and
        `split_rows` and `replicate` do nothing without it. Products of float32 arrays are float32
        on every platform; JAX's default is less on GPUs (TF32) and TPUs (bfloat16). With the dtypes
        "tf32" and "bfloat16" of `ModelConfig`, they may be TF32. The function takes positional
        arguments.
        """
        precision = "highest" if dtype == "float32" else "tensorfloat32"

        @functools.wraps(function)
        def traced(*arguments: Any) -> Any:
            mesh = self.mesh.abstract_mesh
            with use_abstract_mesh(mesh), jax.default_matmul_precision(precision):
                return function(*arguments)

        # The name of the program in profiles; a functools.partial has none.
        traced.__name__ = getattr(function, "func", function).__name__
        return traced

    def local_rows(self, rows: int) -> slice:
        """The rows of a global batch of `rows` that belong to this process's devices."""
        own = self.batch_sharded.addressable_devices_indices_map((rows,)).values()
        ranges = [index[0].indices(rows) for index in own]
        return slice(min(start for start, _, _ in ranges), max(stop for _, stop, _ in ranges))

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on its devices and returns the global batch."""
        return {
            name: jax.make_array_from_process_local_data(self.batch_sharded, array)
            for name, array in batch.items()
        }


def is_on_cpu() -> bool:
    """Whether the program that is traced is for CPUs: those of the current mesh, or the default."""
    device = get_abstract_mesh().abstract_device
    return jax.default_backend() == "cpu" if device is None else device.device_kind == "cpu"


def split_rows(x: jax.Array) -> jax.Array:
    """Splits the first axis over the devices of the current mesh, if there is one."""
    return _constrain(x, PartitionSpec(AXIS))


def replicate(x: jax.Array) -> jax.Array:
    """Puts a copy on every device of the current mesh, if there is one."""
    return _constrain(x, PartitionSpec())


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    # In jax.shard_map the axis is manual: there an array is one device's part and stays so.
    return with_sharding_constraint(x, spec) if AXIS in get_abstract_mesh().auto_axes else x


def make_layout(devices: Sequence[jax.Device] | None = None, *, fsdp: bool = False) -> Layout:
    """Creates a mesh over the given devices, by default over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    # The default axis type is Explicit, under which the token-wise product of two operands that are
    # both split on `data` is an error.
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    return Layout(mesh, fsdp)


def map_batch_chunks(
    function: Callable[[Any, Any], Any], params: Any, arrays: Any, *, chunk: int, layout: Layout
) -> Any:
    """Computes `function(params, arrays)` for one chunk of rows after another to save memory.

    The backward pass recomputes each chunk, so it needs the memory of one chunk and the gradient is
    exact. Each chunk takes the same number of rows from every device: no row moves and no device
    idles. The gradient of the parameters is added up on each device and summed between devices
    once; with fsdp, parameters are gathered once, too.

    Args:
      function: maps parameters and arrays with C rows to arrays with C rows; each row depends on
        that row alone.
      params: tree of parameters, split as `layout.parameters` says.
      arrays: tree of [B, ...] arrays, batch-sharded, as the result.
      chunk: C, over all devices; a multiple of the device count and a divisor of B.
      layout: of the rows.
    """
    rows = chunk // layout.device_count
    specs = jax.tree.map(lambda x: layout.parameter(x.shape).spec, params)

    def whole(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.all_gather(x, AXIS, axis=spec.index(AXIS), tiled=True) if AXIS in spec else x

    def on_device(params: Any, arrays: Any) -> Any:
        params = jax.tree.map(whole, params, specs)
        chunks = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), arrays)
        results = jax.lax.map(jax.checkpoint(functools.partial(function, params)), chunks)
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), results)

    split = PartitionSpec(AXIS)
    # Without the check, the gradient of a replicated parameter is summed where it leaves the loop;
    # with it, at each use.
    return jax.shard_map(
        on_device, mesh=layout.mesh, in_specs=(specs, split), out_specs=split, check_vma=False
    )(params, arrays)


def gather_and_compare(
    function: Callable[[Any, Any], jax.Array], rows: Any, columns: Any, *, layout: Layout
) -> jax.Array:
    """`function(rows, columns)`, an array [A, B] of which each device computes its rows.

    The columns are gathered once, and the gradients of all rows are summed and split again once,
    also where the function works in blocks: XLA would sum those of each block.

    Args:
      function: compares A rows with B columns; it uses no parameters.
      rows: tree of [A, ...] arrays, batch-sharded, as the result.
      columns: tree of [B, ...] arrays, batch-sharded.
      layout: of both.
    """

    def on_device(rows: Any, columns: Any) -> jax.Array:
        gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)
        return function(rows, jax.tree.map(gather, columns))

    split = PartitionSpec(AXIS)
    return jax.shard_map(
        on_device, mesh=layout.mesh, in_specs=(split, split), out_specs=split, check_vma=False
    )(rows, columns)
