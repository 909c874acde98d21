"""Flags and error messages that `build` and `check` share."""

import argparse
import contextlib
import errno
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.datasets import builder_class
from drl_jax.config import FRAME_CLOCKS, INTERPOLATIONS, RESIZES, STORAGE_ENCODINGS
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.storage import StorageSpec
from drl_jax.runtime.cli import Parser, add_plugin_flag, positive_int
from drl_jax.runtime.errors import Unavailable, UserError, one_line, system_errors
from drl_jax.runtime.plugins import DATASETS, load_plugins

if TYPE_CHECKING:
    from data_prep.video_folder import Plan

# Maximum time to decode one video, seconds.
DECODE_TIMEOUT = 300


@contextlib.contextmanager
def disk_errors(data_dir: Path) -> Iterator[None]:
    """Converts errors of files in the block, which writes to `data_dir`, to a UserError."""
    try:
        yield
    # array_record raises RuntimeError.
    except (OSError, RuntimeError) as error:
        found = next(system_errors(error), None)
        if found is None and isinstance(error, RuntimeError):
            raise
        if found is None:
            raise UserError(f"{data_dir} cannot be read or written ({one_line(error)})") from error
        if found.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable(data_dir, found, "read or written") from error
        # "" or " on node NAME": the engine of a cluster adds it.
        node = found.strerror.removeprefix(os.strerror(found.errno))
        raise UserError(
            f"no space left in {data_dir}{node}; free disk space, then rerun the command to"
            " continue"
        ) from error


def plan_of(options: argparse.Namespace, quarantine: Mapping[str, str]) -> "Plan":
    """Reads the annotations and finds their videos; leaves out those in quarantine."""
    from data_prep.video_folder import make_plan

    builder = builder_class(options.dataset)
    annotations = builder.read_annotations(options.annotations)
    if annotations.contained is None and options.videos is None:
        raise UserError(
            f"{options.dataset} needs --videos=DIR: {options.annotations} names video files"
        )
    if annotations.contained is not None and options.videos is not None:
        print(f"--videos is not used: the videos are inside {options.annotations}")
    return make_plan(annotations, options.videos, quarantine, protocols=builder.PROTOCOLS)


def parse(
    parser: Parser, arguments: Sequence[str] | None, names: Collection[str]
) -> argparse.Namespace:
    """Parses arguments, of which `dataset` is one of `names` or registered by `--plugin`."""
    options = parser.parse_args(arguments)
    try:
        load_plugins(options.plugin)
    except UserError as error:
        parser.error(str(error))
    if options.dataset not in (known := sorted({*names, *DATASETS})):
        parser.error(f"invalid choice: {options.dataset!r} (choose from {', '.join(known)})")
    return options


def add_source_flags(parser: Parser, *, required: bool) -> None:
    """Adds the flags of the source files and of the storage variant, and `--plugin`."""
    add_plugin_flag(parser, "the dataset")
    # Not required: annotation files may contain the videos.
    parser.add_argument("--videos", type=Path, metavar="DIR", help="folder of the video files")
    parser.add_argument(
        "--annotations",
        type=Path,
        required=required,
        metavar="PATH",
        help="folder of the annotation files; for custom, a .csv or .jsonl file, or .parquet or"
        " .tar files: one, a folder, or a pattern such as 'shards/*.tar'. Rows and videos that"
        " cannot be used are left out and listed; the command ends if they are more than 50 %% of a"
        " file's rows or of the videos",
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="directory of built datasets (%(default)s)",
    )
    size = "side of the stored frames, pixels"
    parser.add_argument("--image_size", type=positive_int, metavar="N", help=size)
    parser.add_argument(
        "--resize",
        choices=RESIZES,
        help="crop: the short side becomes N, and the centre is cut out; squash: both sides"
        " become N",
    )
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, help="filter of the resize")
    clock = "frames: one in round(fps), as the reference; time: what is seen at each second"
    parser.add_argument("--frame_clock", choices=FRAME_CLOCKS, help=clock)
    parser.add_argument(
        "--as_shown",
        action=argparse.BooleanOptionalAction,
        help="frames as a screen shows them: HDR in standard range, deinterlaced, on white where"
        " they are transparent",
    )
    number = "maximum frames per video"
    parser.add_argument("--max_frames", type=positive_int, metavar="N", help=number)
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
    form = FrameForm(
        options.image_size or default.form.size,
        options.resize or default.form.resize,
        options.interpolation or default.form.interpolation,
        default.form.as_shown if options.as_shown is None else options.as_shown,
    )
    return StorageSpec(
        form,
        options.max_frames or default.max_frames,
        options.storage or default.encoding,
        options.frame_clock or default.frame_clock,
    )
