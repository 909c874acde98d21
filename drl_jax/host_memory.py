"""The C library's memory, as XLA's CPU backend uses it."""

import ctypes
import sys

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Lets the process keep the memory that it frees, for its next allocations.

    XLA on a CPU allocates the temporary memory of each step anew, in pieces that glibc takes from
    the kernel and returns at once; faulting the pages in again took a fifth of the training step
    of `configs/shapes.py`. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
