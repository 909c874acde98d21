"""Decodes many videos in a pool of processes, in order, with bounded memory."""

import collections
import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from drl_jax.video import VideoError, read_frames

_JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A video's frames in stored form, or why there are none.

    Attributes:
      frames: uint8 [F, S, S, 3] for `raw`, a list of F JPEG files for `jpeg`; None if unreadable.
      error: empty if readable.
    """

    frames: np.ndarray | list[bytes] | None
    error: str = ""


def decode_videos(
    paths: Sequence[Path], max_frames: int, image_size: int, storage: str
) -> Iterator[Decoded]:
    """Decodes videos with all cores.

    Args:
      paths: video files.
      max_frames: see `drl_jax.video.sample_positions`.
      image_size: side of the frames, pixels.
      storage: "jpeg" or "raw".

    Yields:
      One Decoded for each path, in order. A file that cannot be read is a value, not an exception.
    """
    workers = min(os.cpu_count() or 1, len(paths))
    # Spawned, because forking a process that runs jax's or TFDS's threads can deadlock.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: collections.deque[Future[Decoded]] = collections.deque()
        try:
            for path in paths:
                waiting.append(pool.submit(_decode, path, max_frames, image_size, storage))
                # The window bounds how many decoded videos wait for a slow one before them.
                if len(waiting) > 8 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _decode(path: Path, max_frames: int, image_size: int, storage: str) -> Decoded:
    try:
        frames = read_frames(path, max_frames, image_size)
    except VideoError as error:
        return Decoded(None, str(error))
    return Decoded(frames if storage == "raw" else [_encode_jpeg(frame) for frame in frames])


def _encode_jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    # 4:4:4: halved chroma costs more than the quality step from 95 to 90.
    Image.fromarray(frame).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")
    return file.getvalue()
