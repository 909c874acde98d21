"""Stored frames against a fresh decode of the videos they came from.

    python -m data_prep.compare msrvtt --videos=DIR --data_dir=data [--samples=50]

For each built form of the dataset: the largest and the mean difference of pixels (levels of 255).
`raw` has to be exact; `jpeg` of quality 95 is some levels off. Exits with 1 if a video's frames are
not those of its file.
"""

import argparse
import dataclasses
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.command import positive
from data_prep.datasets import dataset_names
from data_prep.retrieval_builder import DECODE_TIMEOUT
from drl_jax.data.records import FORMAT_VERSION, DatasetError, VideoDataset
from drl_jax.data.video import Span, VideoError, read_frames
from drl_jax.runtime.errors import report_errors
from drl_jax.runtime.worker_pool import Lost, map_in_processes

# Mean difference of a video above which JPEG cannot be the reason: it has 1 to 3 levels.
_SAME_VIDEO = 6.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a form's sample showed.

    Attributes:
      videos: how many were compared.
      largest: difference of pixels, levels.
      mean: over all pixels.
      wrong: what is wrong with videos whose frames are not those of their file, by id.
    """

    videos: int
    largest: int
    mean: float
    wrong: dict[str, str]


def compare(directory: Path, videos: Path, samples: int, seed: int = 0) -> Comparison:
    """Compares some videos of a built dataset with their files.

    Args:
      directory: of the dataset in one form.
      videos: folder of the video files.
      samples: how many videos, drawn at random.
      seed: of the draw.

    Raises:
      DatasetError: no dataset, or one that does not say where its videos came from.
    """
    dataset = VideoDataset(directory)
    if not dataset.sources:
        raise DatasetError(
            f"{directory} does not say which files it was made of; build it again (--overwrite)"
        )
    settings = dataset.manifest["settings"]
    picked = sorted(random.Random(seed).sample(range(len(dataset)), min(samples, len(dataset))))
    calls = []
    for video in picked:
        file, *span = dataset.sources[video]
        calls.append(
            (videos / file, settings["max_frames"], settings["image_size"], tuple(span) or None)
        )
    largest, total, pixels, wrong = 0, 0.0, 0, {}
    fresh = map_in_processes(_decode, calls, timeout=DECODE_TIMEOUT)
    for video, frames in tqdm(
        zip(picked, fresh, strict=True), directory.parent.name, len(picked), unit="video"
    ):
        name = dataset.video_ids[video]
        stored = dataset.read_frames(video)
        if isinstance(frames, Lost | str):
            wrong[name] = frames if isinstance(frames, str) else frames.reason
        elif frames.shape != stored.shape:
            wrong[name] = f"{len(stored)} frames are stored, its file has {len(frames)}"
        else:
            difference = np.abs(frames.astype(np.int16) - stored)
            largest = max(largest, int(difference.max()))
            total, pixels = total + float(difference.sum()), pixels + difference.size
            allowed = 0 if settings["storage"] == "raw" else _SAME_VIDEO
            if difference.mean() > allowed:
                wrong[name] = f"its pixels are {difference.mean():.1f} levels off on average"
    return Comparison(len(picked), largest, total / max(pixels, 1), wrong)


def _decode(path: Path, max_frames: int, image_size: int, span: Span | None) -> np.ndarray | str:
    try:
        return read_frames(path, max_frames, image_size, span)
    except VideoError as error:
        return f"its file {error}"


def built_forms(data_dir: Path, dataset: str) -> list[Path]:
    """Directories of all built forms of a dataset.

    Raises:
      DatasetError: there is none.
    """
    found = sorted((data_dir / dataset).glob(f"*/{FORMAT_VERSION}"))
    if not found:
        raise DatasetError(
            f"no form of {dataset} is built in {data_dir}; build it with: python -m"
            f" data_prep.build {dataset} --data_dir={data_dir}"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = argparse.ArgumentParser("data_prep.compare", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=dataset_names())
    parser.add_argument("--videos", type=Path, required=True, help="folder of the video files")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where datasets lie")
    parser.add_argument("--samples", type=positive, default=50, help="videos of each form")
    options = parser.parse_args(arguments)

    def run() -> int:
        if not options.videos.is_dir():
            raise DatasetError(f"no directory {options.videos}; --videos names the videos' folder")
        wrong = {}
        print(f"{'form':<20}{'videos':>8}{'max':>6}{'mean':>8}")
        for directory in built_forms(options.data_dir, options.dataset):
            found = compare(directory, options.videos, options.samples)
            form = directory.parent.name
            print(f"{form:<20}{found.videos:>8}{found.largest:>6}{found.mean:>8.3f}")
            wrong |= {f"{form}, {video}": reason for video, reason in found.wrong.items()}
        for video, reason in list(wrong.items())[:10]:
            print(f"  {video}: {reason}")
        if wrong:
            raise DatasetError(
                f"{len(wrong)} stored videos are not what {options.videos} holds; if the files are"
                " the right ones, build again (--overwrite)"
            )
        return 0

    return report_errors("data_prep.compare", run, "nothing was changed")


if __name__ == "__main__":
    sys.exit(main())
