"""Flags that the commands on datasets share."""

import argparse
from pathlib import Path

from data_prep.datasets import builder_class
from drl_jax.config import STORAGE_ENCODINGS
from drl_jax.data.storage import StorageSpec
from drl_jax.runtime.cli import Parser, positive_int

# Maximum time to decode one video, seconds.
DECODE_TIMEOUT = 300


def add_data_dir_flag(parser: Parser) -> None:
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="directory of built datasets (%(default)s)",
    )


def add_videos_flag(parser: Parser, *, required: bool) -> None:
    parser.add_argument(
        "--videos", type=Path, required=required, metavar="DIR", help="folder of the video files"
    )


def add_source_flags(parser: Parser, *, required: bool) -> None:
    """Adds the flags of the source files and of the storage variant."""
    add_videos_flag(parser, required=required)
    parser.add_argument(
        "--annotations",
        type=Path,
        required=required,
        metavar="PATH",
        help="folder of the annotation files; for custom, the .csv or .jsonl file",
    )
    add_data_dir_flag(parser)
    parser.add_argument(
        "--image_size", type=positive_int, metavar="N", help="side of the stored frames, pixels"
    )
    parser.add_argument(
        "--max_frames", type=positive_int, metavar="N", help="maximum frames per video"
    )
    parser.add_argument("--storage", choices=STORAGE_ENCODINGS, help="jpeg: small; raw: exact")
    parser.add_argument(
        "--timeout",
        type=positive_int,
        default=DECODE_TIMEOUT,
        metavar="SECONDS",
        help="maximum seconds to decode one video (%(default)s)",
    )


def requested_storage(options: argparse.Namespace) -> StorageSpec:
    """Storage variant from the flags of `add_source_flags`; the dataset's default where unset."""
    default = builder_class(options.dataset).DEFAULT_STORAGE
    return StorageSpec(
        options.image_size or default.image_size,
        options.max_frames or default.max_frames,
        options.storage or default.encoding,
    )
