"""Processors and memory that this process may use, within affinity and cgroup limits.

`os.cpu_count` counts the machine's processors, including those that SLURM or a container does not
give to this process.
"""

import contextlib
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUP = Path("/proc/self/cgroup")


def available_cpus() -> int:
    """Number of processors: the affinity mask, bounded by the CPU quota of the cgroup."""
    cpus = len(os.sched_getaffinity(0))
    for directory in _cgroup_directories():
        quota, period = _quota(directory)
        if quota > 0:
            cpus = min(cpus, math.ceil(quota / period))
    return max(cpus, 1)


def available_memory() -> int:
    """Bytes that can be allocated without swapping.

    The kernel's MemAvailable (free memory and page cache that can be reclaimed), bounded by the
    memory limits of the cgroup.
    """
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines() if ":" in line)
    # Kernels before 3.14 do not estimate it.
    available = int(fields.get("MemAvailable", fields["MemFree"]).split()[0]) * 1024
    for directory in _cgroup_directories():
        limit = _number(directory / "memory.max", directory / "memory.limit_in_bytes")
        used = _number(directory / "memory.current", directory / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            reclaimable = _inactive_file_bytes(directory / "memory.stat")
            available = min(available, max(limit - used + reclaimable, 0))
    return available


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Limits what this process, in all its threads, can allocate while the block runs.

    An allocation beyond the limit fails: in Python, with a MemoryError.

    Args:
      size: bytes, beside those that the process has already.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
    bounds = (1024 * used + size, *(limit for limit in before if limit != resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _cgroup_directories() -> Iterator[Path]:
    """Directories of this process's cgroups and their parents, of version 2 and of version 1."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _CGROUPS / controllers if controllers else _CGROUPS
        directory = root / path.lstrip("/")
        # In a container the path is the host's and does not exist: the root is the container's.
        for candidate in (directory, *directory.parents):
            if candidate.is_relative_to(root) and candidate.is_dir():
                yield candidate


def _quota(directory: Path) -> tuple[float, float]:
    """CPU quota and period in microseconds; a quota of 0 means none."""
    try:
        quota, period = (directory / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota = _number(directory / "cpu.cfs_quota_us") or 0
        period = _number(directory / "cpu.cfs_period_us") or 1
    return (0.0, 1.0) if quota == "max" else (float(quota), float(period))


def _number(*paths: Path) -> int | None:
    """The number in the first of these files that has one."""
    for path in paths:
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            continue
    return None


def _inactive_file_bytes(path: Path) -> int:
    """Page cache that counts as used and is reclaimed first."""
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    # Version 1 counts usage with, and `inactive_file` without, the children of a cgroup.
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
