"""The cluster of `--ray`. Ray is an extra, and takes a second to import."""

import os
from typing import TYPE_CHECKING

from drl_jax.runtime.errors import ClusterError, one_line

if TYPE_CHECKING:
    from drl_jax.runtime.ray_cluster import RayCluster

# Ray reads these when it is imported: no statistics, no notice about GPUs, and an address without
# a cluster is reported after seconds, not minutes.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_gcs_rpc_server_connect_timeout_s": "5",
    "RAY_py_gcs_connect_timeout_s": "10",
}


def connect(address: str) -> "RayCluster":
    """Connects to the Ray cluster of an address (see `RayCluster`).

    Raises:
      ClusterError: Ray is not installed, or no cluster is there.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from drl_jax.runtime.ray_cluster import RayCluster
    except ImportError as error:
        raise ClusterError(
            f"--ray needs Ray ({one_line(error)}): pip install 'drl_jax[ray]', on every node"
        ) from error
    return RayCluster(address)
