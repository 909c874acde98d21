"""One mesh over all devices, axis `data`, and the layouts that the program uses on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices of all processes on one axis, `data`."""
    # make_mesh defaults to Explicit axes now, under which the token-wise einsum (both operands
    # split on `data`) is an error rather than a choice of layout.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def rows(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices, the rest whole: batches, similarity rows."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device: parameters, gathered features."""
    return NamedSharding(mesh, PartitionSpec())


def shard_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices; the result is the global batch."""
    return {
        name: jax.make_array_from_process_local_data(rows(mesh), array)
        for name, array in batch.items()
    }
