"""Flags that the commands on datasets share."""

import argparse
from pathlib import Path

from data_prep.datasets import builder_class
from data_prep.retrieval_builder import DECODE_TIMEOUT


def add_source_flags(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Flags that say what is read, and in which form it is or would be stored."""
    parser.add_argument("--videos", type=Path, required=required, help="folder of the video files")
    parser.add_argument(
        "--annotations",
        type=Path,
        required=required,
        help="folder of the annotation files; of custom, the .csv or .jsonl file",
    )
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where datasets go")
    parser.add_argument("--image_size", type=positive, help="side of the stored frames, pixels")
    parser.add_argument("--max_frames", type=positive, help="stored frames a video, at most")
    parser.add_argument("--storage", choices=("jpeg", "raw"), help="jpeg: small; raw: exact")
    parser.add_argument(
        "--timeout",
        type=positive,
        default=DECODE_TIMEOUT,
        help="seconds that a video may take (%(default)s)",
    )


def form_of(options: argparse.Namespace) -> tuple[int, int, str]:
    """Side of the frames, frames a video and storage: as asked, or else the dataset's default."""
    image_size, max_frames, storage = builder_class(options.dataset).DEFAULT_FORM
    return (
        options.image_size or image_size,
        options.max_frames or max_frames,
        options.storage or storage,
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, not {text!r}")
    return int(text)
