"""Where the frames of training videos come from: disk, this host's memory, or the devices.

Frames of a video are uint8 [F, H, W, 3], padded with black, and a mask bool [F].
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from drl_jax.data.records import DatasetError, VideoDataset
from drl_jax.runtime.distributed import is_main
from drl_jax.sharding import AXIS, Layout

# Videos that go to the devices together while `DeviceFrames` fills.
_CHUNK = 64


def pad_frames(frames: np.ndarray, max_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [F, H, W, 3] -> [max_frames, H, W, 3], padded with black, and bool [max_frames]."""
    padding = max_frames - len(frames)
    mask = np.arange(max_frames) < len(frames)
    return np.pad(frames, ((0, padding), (0, 0), (0, 0), (0, 0))), mask


class DiskFrames:
    """Reads and decodes a video each time."""

    def __init__(self, dataset: VideoDataset, max_frames: int):
        self._dataset, self._max_frames = dataset, max_frames

    def read(self, video: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames and mask of the video at a position of the records."""
        return pad_frames(self._dataset.read_frames(video), self._max_frames)


class MemoryFrames:
    """Reads a video once and keeps it in this host's memory."""

    def __init__(self, dataset: VideoDataset, videos: np.ndarray, max_frames: int):
        """Reserves memory; it fills as videos are read.

        Args:
          dataset: the dataset.
          videos: int [V], positions of the videos that will be asked for, without repetition.
          max_frames: F.

        Raises:
          DatasetError: the frames would not fit in memory.
        """
        self._disk = DiskFrames(dataset, max_frames)
        self._row = {int(video): row for row, video in enumerate(videos)}
        shape = self._disk.read(videos[0])[0].shape
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        _check_room(len(videos), shape, free, "memory", "this host's memory has")
        self._frames = np.empty((len(videos), *shape), np.uint8)
        self._masks = np.empty((len(videos), max_frames), bool)
        # Set last: another thread that sees it set finds the frames there. Two threads that read
        # the same video at once write the same bytes.
        self._kept = np.zeros(len(videos), bool)

    def read(self, video: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames and mask of the video at a position of the records."""
        row = self._row[int(video)]
        if not self._kept[row]:
            self._frames[row], self._masks[row] = self._disk.read(video)
            self._kept[row] = True
        return self._frames[row], self._masks[row]


class DeviceFrames:
    """Keeps all frames on the devices and gathers batches there.

    Each device holds its share of the *pixels* of every video. A batch is then picked without
    asking another device, and only the batch itself moves, once, to where its rows belong.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        videos: np.ndarray,
        max_frames: int,
        layout: Layout,
        num_threads: int,
    ):
        """Reads all videos, with a progress bar.

        Args:
          dataset: the dataset.
          videos: int [V], positions of the videos; a batch names them by their place in it.
          max_frames: F.
          layout: over which devices.
          num_threads: threads that read.

        Raises:
          DatasetError: the frames would not fit on the devices.
        """
        disk = DiskFrames(dataset, max_frames)
        shape = disk.read(videos[0])[0].shape
        stats = layout.mesh.local_devices[0].memory_stats()
        if stats:
            free = (stats["bytes_limit"] - stats["bytes_in_use"]) * layout.devices
            _check_room(len(videos), shape, free, "device", "the devices together have")
        pixels = int(np.prod(shape))
        columns = -(-pixels // layout.devices) * layout.devices
        by_pixel = NamedSharding(layout.mesh, PartitionSpec(None, AXIS))

        def put(store: jax.Array, chunk: jax.Array, row: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(store, chunk, (row, 0))

        put = jax.jit(put, donate_argnums=0, out_shardings=by_pixel)
        # Rows past the last video, so that every chunk has the same size.
        rows = -(-len(videos) // _CHUNK) * _CHUNK
        empty = jax.jit(lambda: jnp.zeros((rows, columns), jnp.uint8), out_shardings=by_pixel)
        self._frames = empty()
        masks = np.zeros((len(videos), max_frames), bool)
        with (
            ThreadPoolExecutor(num_threads) as pool,
            tqdm(
                total=len(videos),
                desc="frames to the devices",
                unit="video",
                disable=not is_main(),
            ) as progress,
        ):
            for start in range(0, len(videos), _CHUNK):
                part = videos[start : start + _CHUNK]
                chunk = np.zeros((_CHUNK, columns), np.uint8)
                for row, (frames, mask) in enumerate(pool.map(disk.read, part)):
                    chunk[row, :pixels], masks[start + row] = frames.reshape(-1), mask
                placed = jax.make_array_from_callback(chunk.shape, by_pixel, chunk.__getitem__)
                self._frames = put(self._frames, placed, jnp.int32(start))
                progress.update(len(part))
        self._masks = jax.make_array_from_callback(masks.shape, layout.whole, masks.__getitem__)

        def gather(frames: jax.Array, masks: jax.Array, picked: jax.Array):
            picked = with_sharding_constraint(picked, layout.whole)
            batch = with_sharding_constraint(frames[picked], by_pixel)
            batch = with_sharding_constraint(batch, layout.rows)
            return batch[:, :pixels].reshape(-1, *shape), masks[picked]

        self._gather = jax.jit(gather, out_shardings=layout.rows)

    def fill(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Replaces `video` int32 [B], places in `videos`, by `frames` and `frame_mask`."""
        batch = dict(batch)
        frames, mask = self._gather(self._frames, self._masks, batch.pop("video"))
        return {**batch, "frames": frames, "frame_mask": mask}


def to_devices(
    stream: Iterator[dict[str, np.ndarray]],
    layout: Layout,
    fill: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Batches on the devices.

    Steps are asynchronous: a batch is read and sent while the step before it runs, as long as the
    caller does not wait for that step first.

    Args:
      stream: this process's rows of each batch.
      layout: of the batches.
      fill: completes a batch on the devices (`DeviceFrames.fill`).
    """
    for rows in stream:
        batch = layout.put_rows(rows)
        yield fill(batch) if fill else batch


def _check_room(videos: int, shape: tuple, free: int, cache: str, place: str) -> None:
    wanted = videos * int(np.prod(shape))
    if wanted > free:
        raise DatasetError(
            f"config.data.cache={cache}: {videos} videos take {wanted / 1e9:.1f} GB, and {place}"
            f" {free / 1e9:.1f} GB free; config.data.cache=none reads them from disk"
        )
