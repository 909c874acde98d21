"""Compares the stored frames of a built dataset with a fresh decode of its source files.

    python -m data_prep.compare msrvtt --videos=DIR --data_dir=data [--samples=50]

DIR is the folder of the video files, or of the tar or Parquet files that contain the videos.

Prints the maximum and mean difference of pixels (levels of 255) for each built storage variant.
`raw` must be exact; `jpeg` of quality 95 differs by a few levels. Exit status: 1 if the stored
frames of a video are not those of its file.
"""

import argparse
import sys
from collections.abc import Sequence

from data_prep.command import DECODE_TIMEOUT, add_data_dir_flag, add_videos_flag
from data_prep.datasets import dataset_names
from drl_jax.runtime.cli import Parser, positive_int, run_command
from drl_jax.runtime.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser("python -m data_prep.compare", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=dataset_names())
    add_videos_flag(parser, required=True)
    add_data_dir_flag(parser)
    parser.add_argument(
        "--samples",
        type=positive_int,
        default=50,
        metavar="N",
        help="videos per storage variant (%(default)s)",
    )
    options = parser.parse_args(arguments)
    return run_command("data_prep.compare", lambda: _compare(options))


def _compare(options: argparse.Namespace) -> None:
    from data_prep.dataset_compare import built_variants, compare_dataset
    from drl_jax.data.records import DatasetError

    if not options.videos.is_dir():
        raise DatasetError(
            f"no directory {options.videos}; --videos must be the folder of the video files"
        )
    wrong, unavailable = {}, {}
    variants = built_variants(options.data_dir, options.dataset)
    width = max(20, *(len(directory.parent.name) for directory in variants))
    print(f"{'storage':<{width}}{'videos':>8}{'max':>6}{'mean':>8}")
    for directory in variants:
        found = compare_dataset(directory, options.videos, options.samples, timeout=DECODE_TIMEOUT)
        storage = directory.parent.name
        print(f"{storage:<{width}}{found.videos:>8}{found.largest:>6}{found.mean:>8.3f}")
        wrong |= {f"{storage}, {video}": reason for video, reason in found.wrong.items()}
        unavailable |= {f"{storage}, {video}": why for video, why in found.unavailable.items()}
    for video, reason in [*wrong.items(), *unavailable.items()][:10]:
        print(f"  {video}: {reason}")
    if wrong:
        raise DatasetError(
            f"{len(wrong)} stored videos differ from their files in {options.videos}; if the files"
            " are correct, rebuild the dataset with --overwrite"
        )
    if unavailable:
        raise UserError(
            f"{len(unavailable)} videos could not be read, which may pass; rerun the command"
        )


if __name__ == "__main__":
    sys.exit(main())
