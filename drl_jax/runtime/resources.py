"""Processors and memory that this process may use, and how XLA uses memory and a cache on disk.

`os.cpu_count` counts the machine's processors, including those that SLURM or a container does not
give to this process.
"""

import contextlib
import ctypes
import math
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUP = Path("/proc/self/cgroup")
# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


def available_cpus() -> int:
    """Number of processors: the affinity mask, bounded by the CPU quota of the cgroup."""
    cpus = len(os.sched_getaffinity(0))
    for directory in _cgroup_directories():
        quota = _words(directory / "cpu.max")
        if not quota:  # Version 1.
            quota = _words(directory / "cpu.cfs_quota_us") + _words(directory / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0] not in ("max", "-1"):
            cpus = min(cpus, math.ceil(int(quota[0]) / int(quota[1])))
    return max(cpus, 1)


def available_memory() -> int:
    """Bytes that can be allocated without swapping: MemAvailable, bounded by the cgroup."""
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines() if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for directory in _cgroup_directories():
        limit = _words(directory / "memory.max") or _words(directory / "memory.limit_in_bytes")
        used = _words(directory / "memory.current") or _words(directory / "memory.usage_in_bytes")
        if limit and used and limit != ["max"]:
            stat = _words(directory / "memory.stat")
            counts = dict(zip(stat[::2], stat[1::2], strict=True))
            # Page cache counts as used and is reclaimed first. Version 1 counts usage with, and
            # `inactive_file` without, the children of a cgroup.
            cache = counts.get("total_inactive_file", counts.get("inactive_file", 0))
            available = min(available, max(int(limit[0]) - int(used[0]) + int(cache), 0))
    return available


def _cgroup_directories() -> Iterator[Path]:
    """Directories of this process's cgroups and their parents, of version 2 and of version 1."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _CGROUPS / controllers
        directory = root / path.lstrip("/")
        # In a container the path is the host's and does not exist: the root is the container's.
        for candidate in (directory, *directory.parents):
            if candidate.is_relative_to(root) and candidate.is_dir():
                yield candidate


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Lets this process allocate at most `size` more bytes in the block; MemoryError beyond."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
    bounds = (1024 * used + size, *(limit for limit in before if limit != resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def keep_freed_memory() -> None:
    """Keeps freed memory in this process instead of returning it to the kernel.

    XLA's CPU backend allocates the temporaries of a program at each call and frees them after it.
    By default glibc maps and unmaps them each time, and the kernel clears every page again: 40 % of
    the time of a small training step. The process then stays at its peak memory.

    Call this before the first use of a device: XLA's threads otherwise have arenas of their own,
    which cannot hold large blocks. Does nothing on a host with an accelerator, unless JAX_PLATFORMS
    is `cpu`, and without glibc.
    """
    cpu_only = os.environ.get("JAX_PLATFORMS") == "cpu"
    has_accelerator = any(Path(device).exists() for device in _ACCELERATORS)
    if (has_accelerator and not cpu_only) or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # Never, however large the free memory is.
    mallopt(_M_TOP_PAD, 2**28)


def cache_compilations() -> None:
    """Keeps compiled XLA programs on disk for later runs of any command.

    The directory is `$XDG_CACHE_HOME/drl_jax/xla`, `~/.cache/drl_jax/xla` by default. JAX's own
    variable JAX_COMPILATION_CACHE_DIR names another directory, or turns the cache off if empty.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "drl_jax", "xla")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # A read-only home, as in some containers: compilation is only slower.
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # JAX keeps what takes a second. Opening a run compiles 30 small programs, for 4 seconds in all.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
