"""Disk space that a dataset needs, estimated before it is built."""

import shutil
from pathlib import Path

from drl_jax.data.storage import StorageSpec

# Measured on 15 real clips: 253,224 bytes for 12 JPEG frames of 224 x 224, quality 95, 4:4:4.
_JPEG_BYTES_PER_PIXEL = 253224 / (12 * 224 * 224)


def stored_bytes(frames: int, storage: StorageSpec) -> int:
    """Estimated size in bytes of a total number of stored frames."""
    per_pixel = 3 if storage.encoding == "raw" else _JPEG_BYTES_PER_PIXEL
    return int(frames * storage.form.size**2 * per_pixel)


def free_bytes(directory: Path) -> int:
    """Free bytes on the disk of a directory, which may not exist yet."""
    directory = directory.absolute()
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def format_bytes(count: int) -> str:
    """Formats a size as "1.2 GB", or as "3 MB" below 0.1 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
