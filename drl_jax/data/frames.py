"""Sources of training frames: disk, a cache in host memory, or a cache on the devices.

Frames of a video are uint8 [F, H, W, 3], padded with black, with a mask bool [F].
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from drl_jax.data.pictures import pad_frames
from drl_jax.data.records import DatasetError, VideoDataset
from drl_jax.runtime.distributed import is_main
from drl_jax.runtime.resources import available_cpus, available_memory
from drl_jax.runtime.sharding import AXIS, Layout

# Videos per transfer to the devices while `DeviceFrames` fills its cache.
_CHUNK = 64
# Threads that read frames while the same processors compute.
_THREADS_BESIDE_CPU = 4
# Largest part of a memory that `data.cache=auto` gives to frames. MSR-VTT's 9,000 training videos
# of 12 frames are 16 GB, 26 % of what JAX takes of a GPU with 80 GB.
_CACHE_SHARE = 0.3


def reader_threads(num_threads: int) -> int:
    """Resolves `data.num_threads`."""
    if num_threads:
        return num_threads
    return _THREADS_BESIDE_CPU if jax.default_backend() == "cpu" else available_cpus()


def choose_cache(cache: str, frame_bytes: int) -> str:
    """Resolves `data.cache` for a training split of this size: none, memory or device."""
    if cache != "auto":
        return cache
    if jax.default_backend() == "cpu":
        return "none"
    stats = jax.local_devices()[0].memory_stats() or {}
    # What is in use may differ between processes; the limit does not.
    if frame_bytes <= _CACHE_SHARE * stats.get("bytes_limit", 0) * jax.device_count():
        return "device"
    return "memory" if frame_bytes <= _CACHE_SHARE * available_memory() else "none"


class DiskFrames:
    """Reads a video from disk each time it is requested."""

    def __init__(self, dataset: VideoDataset, max_frames: int):
        self._dataset, self._max_frames = dataset, max_frames

    def read(self, video: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames and mask of the video with a record index."""
        return pad_frames(self._dataset.read_frames(video), self._max_frames)


class MemoryFrames:
    """Reads a video once and keeps its frames in host memory."""

    def __init__(self, dataset: VideoDataset, videos: np.ndarray, max_frames: int):
        """Allocates the cache of `videos`, ascending record indices; it fills as they are read.

        Raises:
          DatasetError: the frames would not fit in memory.
        """
        self._disk = DiskFrames(dataset, max_frames)
        self._videos = videos
        shape = self._disk.read(videos[0])[0].shape
        _check_fits(len(videos), shape, available_memory(), "memory", "this process has")
        self._frames = np.empty((len(videos), *shape), np.uint8)
        self._masks = np.empty((len(videos), max_frames), bool)
        # Set after the frames, so that another thread that sees it set reads complete frames. Two
        # threads that read the same video at once write the same bytes.
        self._cached = np.zeros(len(videos), bool)

    def read(self, video: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames and mask of the video with a record index."""
        row = int(np.searchsorted(self._videos, video))
        if not self._cached[row]:
            self._frames[row], self._masks[row] = self._disk.read(video)
            self._cached[row] = True
        return self._frames[row], self._masks[row]


class DeviceFrames:
    """Keeps all frames on the devices and gathers batches there.

    The frames are sharded over their *pixels*: each device holds a slice of every video. Indexing
    a batch then needs no communication; only the batch itself is resharded, once.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        videos: np.ndarray,
        max_frames: int,
        layout: Layout,
        threads: int,
    ):
        """Reads the videos with these record indices, with a progress bar.

        Raises:
          DatasetError: the frames would not fit on the devices.
        """
        disk = DiskFrames(dataset, max_frames)
        shape = disk.read(videos[0])[0].shape
        stats = layout.mesh.local_devices[0].memory_stats()
        if stats:
            free = (stats["bytes_limit"] - stats["bytes_in_use"]) * layout.device_count
            _check_fits(len(videos), shape, free, "device", "the devices have, together,")
        pixels = int(np.prod(shape))
        columns = -(-pixels // layout.device_count) * layout.device_count
        by_pixel = NamedSharding(layout.mesh, PartitionSpec(None, AXIS))

        def put(store: jax.Array, chunk: jax.Array, row: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(store, chunk, (row, 0))

        put = jax.jit(put, donate_argnums=0, out_shardings=by_pixel)
        # Padded to whole chunks, so that all chunks have the same shape.
        rows = -(-len(videos) // _CHUNK) * _CHUNK
        empty = jax.jit(lambda: jnp.zeros((rows, columns), jnp.uint8), out_shardings=by_pixel)
        self._frames = empty()
        masks = np.zeros((len(videos), max_frames), bool)
        progress = tqdm(
            total=len(videos), desc="loading frames", unit="video", disable=not is_main()
        )
        with ThreadPoolExecutor(threads) as pool, progress:
            for start in range(0, len(videos), _CHUNK):
                part = videos[start : start + _CHUNK]
                chunk = np.zeros((_CHUNK, columns), np.uint8)
                for row, (frames, mask) in enumerate(pool.map(disk.read, part)):
                    chunk[row, :pixels], masks[start + row] = frames.reshape(-1), mask
                placed = jax.make_array_from_callback(chunk.shape, by_pixel, chunk.__getitem__)
                self._frames = put(self._frames, placed, jnp.int32(start))
                progress.update(len(part))
        self._masks = jax.make_array_from_callback(
            masks.shape, layout.replicated, masks.__getitem__
        )

        def gather(frames: jax.Array, masks: jax.Array, picked: jax.Array):
            picked = with_sharding_constraint(picked, layout.replicated)
            batch = with_sharding_constraint(frames[picked], by_pixel)
            batch = with_sharding_constraint(batch, layout.batch_sharded)
            return batch[:, :pixels].reshape(-1, *shape), masks[picked]

        self._gather = jax.jit(gather, out_shardings=layout.batch_sharded)

    def fill(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Replaces `video_index` int32 [B], indices into `videos`, by `frames` and `frame_mask`."""
        batch = dict(batch)
        frames, mask = self._gather(self._frames, self._masks, batch.pop("video_index"))
        return {**batch, "frames": frames, "frame_mask": mask}


def _check_fits(videos: int, shape: tuple, free: int, cache: str, owner: str) -> None:
    needed = videos * int(np.prod(shape))
    if needed > free:
        raise DatasetError(
            f"config.data.cache={cache}: {videos} videos need {needed / 1e9:.1f} GB, but {owner}"
            f" {free / 1e9:.1f} GB free; config.data.cache=none reads them from disk"
        )
