"""Compares stored frames with a fresh decode of their source files."""

import dataclasses
import random
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.decode import read_frames_or_error
from data_prep.locations import find_locations
from drl_jax.data.records import FORMAT_VERSION, DatasetError, VideoDataset
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes

# Mean difference, in levels, above which the frames are not those of the file; JPEG gives 1 to 3.
_MAX_JPEG_DIFFERENCE = 6.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences between stored and decoded frames, in levels of 255.

    Attributes:
      videos: number of compared videos.
      largest: largest difference of a pixel.
      mean: mean difference over all pixels.
      wrong: reasons, by id, for videos whose stored frames are not those of their file.
      unavailable: why files could not be read, which may pass, by id.
    """

    videos: int
    largest: int
    mean: float
    wrong: dict[str, str]
    unavailable: dict[str, str]


def compare_dataset(
    directory: Path, videos: Path, samples: int, *, timeout: float, seed: int = 0
) -> Comparison:
    """Compares random videos of a built dataset with their source files.

    Args:
      directory: directory of the built dataset.
      videos: folder of the video files, or of the files that contain the videos.
      samples: number of videos to compare.
      timeout: maximum seconds to decode one video.
      seed: random seed of the choice of videos.

    Raises:
      DatasetError: there is no dataset, or it does not record its source files.
      UserError, OSError: a tar file or Parquet file with the videos cannot be read.
    """
    dataset = VideoDataset(directory)
    if not dataset.sources:
        raise DatasetError(
            f"{directory} does not record its source files; rebuild it with --overwrite"
        )
    storage = dataset.storage
    picked = sorted(random.Random(seed).sample(range(len(dataset)), min(samples, len(dataset))))
    sources = [dataset.sources[video] for video in picked]
    locations = find_locations(videos, [file for file, *_ in sources])
    calls = [
        (location, storage, tuple(span) or None)
        for location, (_, *span) in zip(locations, sources, strict=True)
    ]
    largest, total, pixels, wrong, unavailable = 0, 0.0, 0, {}, {}
    decoded = map_in_processes(read_frames_or_error, calls, timeout=timeout)
    for video, frames in tqdm(
        zip(picked, decoded, strict=True), storage.name, len(picked), unit="video"
    ):
        video_id = dataset.video_ids[video]
        try:
            stored = dataset.read_frames(video)
        except DatasetError as error:
            wrong[video_id] = str(error)
            continue
        if isinstance(frames, WorkerFailure):
            (unavailable if frames.is_passing else wrong)[video_id] = frames.reason
        elif isinstance(frames, str):
            wrong[video_id] = f"its file {frames}"
        elif frames.shape != stored.shape:
            wrong[video_id] = f"{len(stored)} frames are stored, but its file has {len(frames)}"
        else:
            difference = np.abs(frames.astype(np.int16) - stored)
            largest = max(largest, int(difference.max()))
            total, pixels = total + float(difference.sum()), pixels + difference.size
            allowed = 0 if storage.encoding == "raw" else _MAX_JPEG_DIFFERENCE
            if difference.mean() > allowed:
                wrong[video_id] = f"its pixels differ by {difference.mean():.1f} levels on average"
    return Comparison(len(picked), largest, total / max(pixels, 1), wrong, unavailable)


def built_variants(data_dir: Path, dataset: str) -> list[Path]:
    """Directories of all built storage variants of a dataset.

    Raises:
      DatasetError: there is none.
    """
    found = sorted((data_dir / dataset).glob(f"*/{FORMAT_VERSION}"))
    if not found:
        raise DatasetError(
            f"{dataset} is not built in {data_dir}; build it with: python -m data_prep.build"
            f" {dataset} --data_dir={data_dir}"
        )
    return found
