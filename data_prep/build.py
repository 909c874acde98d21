"""Decodes a dataset once, so that training never opens a video.

python -m data_prep.build shapes --data_dir=data
python -m data_prep.build msrvtt --videos=DIR --annotations=DIR --data_dir=data
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import logging

# Only builders are used from here on: nothing in this process runs on a device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tensorflow_datasets as tfds

from data_prep.msrvtt.msrvtt_dataset_builder import Builder as Msrvtt
from data_prep.retrieval_builder import RetrievalBuilder, StorageConfig
from data_prep.shapes import shapes_dataset_builder as shapes
from drl_jax.data.records import FORMAT_VERSION
from drl_jax.errors import UserError

BUILDERS: dict[str, type[RetrievalBuilder]] = {"msrvtt": Msrvtt, "shapes": shapes.Builder}
_DEFAULT_FORMS = {"msrvtt": (224, 12, "jpeg"), "shapes": (64, 4, "raw")}


def build(
    dataset: str,
    *,
    videos: Path,
    annotations: Path,
    data_dir: Path,
    form: tuple[int, int, str] | None = None,
) -> RetrievalBuilder:
    """Decodes and stores a dataset.

    Args:
      dataset: a key of BUILDERS.
      videos: directory of the video files.
      annotations: directory of the annotation files.
      data_dir: where the dataset goes.
      form: side of the frames in pixels, frames a video at most, and "jpeg" or "raw"; None for the
        dataset's default. A dataset that is built already in this form is built again.

    Returns:
      The builder; it says where the dataset lies (`data_dir`) and what it left out (`unusable`).

    Raises:
      UserError: nothing can be built. The data directory is as it was before.
    """
    storage = StorageConfig.of(*(form or _DEFAULT_FORMS[dataset]))
    target = data_dir / dataset / storage.name / FORMAT_VERSION
    with _replacing(target):
        builder = BUILDERS[dataset](
            videos=videos,
            annotations=annotations,
            data_dir=data_dir,
            config=storage,
            file_format="array_record",
        )
        # TFDS announces a download that does not happen.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        if builder.unusable:
            (target / "unusable.json").write_text(json.dumps(builder.unusable, indent=1))
    return builder


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[None]:
    """Moves what stands in the way aside, and puts it back if the new dataset fails."""
    previous = target.with_name(f"previous.{target.name}")
    if target.exists():
        target.rename(previous)
    try:
        yield
    except BaseException:
        for unfinished in target.parent.glob(f"*incomplete*{target.name}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        if previous.exists():
            previous.rename(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _report(builder: RetrievalBuilder) -> None:
    for name, use in builder.missing_files.items():
        print(f"built without the annotation file {name} ({use}): it is absent")
    splits = builder.info.metadata["splits"]
    print(f"built {builder.data_dir}: {len(builder.info.metadata['video_ids'])} videos")
    for name, split in splits.items():
        captions = sum(map(len, split["captions"]))
        print(f"  {name}: {len(split['videos'])} videos, {captions} captions")
    if unusable := builder.unusable:
        print(f"left out {len(unusable)} videos (all in {builder.data_dir}/unusable.json):")
        for video, reason in list(unusable.items())[:10]:
            print(f"  {video}: {reason}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "data_prep.build",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("dataset", choices=sorted(BUILDERS))
    parser.add_argument("--videos", type=Path, help="folder of the video files")
    parser.add_argument("--annotations", type=Path, help="folder of the annotation files")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where datasets go")
    parser.add_argument("--image_size", type=int, help="side of the stored frames, pixels")
    parser.add_argument("--max_frames", type=int, help="stored frames a video, at most")
    parser.add_argument("--storage", choices=("jpeg", "raw"), help="jpeg: small; raw: exact")
    parser.add_argument("--size", choices=sorted(shapes.SIZES), help="shapes only: how many clips")
    parser.add_argument("--overwrite", action="store_true", help="build again what is built")
    options = parser.parse_args(arguments)
    if options.dataset == "shapes":
        if options.videos or options.annotations:
            parser.error("shapes draws its own videos: leave out --videos and --annotations")
        source = options.data_dir / "source" / f"shapes_{options.size or 'full'}"
        options.videos, options.annotations = source / "videos", source
    elif not options.videos or not options.annotations:
        parser.error(f"{options.dataset} needs --videos=DIR and --annotations=DIR")
    elif options.size:
        parser.error("--size is for shapes only")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parse(arguments)
    logging.set_verbosity(logging.ERROR)  # TFDS warns of every form it was not shipped with
    tfds.disable_progress_bar()
    default = _DEFAULT_FORMS[options.dataset]
    form = (
        options.image_size or default[0],
        options.max_frames or default[1],
        options.storage or default[2],
    )
    target = options.data_dir / options.dataset / StorageConfig.of(*form).name / FORMAT_VERSION
    if target.exists() and not options.overwrite:
        print(f"{target} is built already; --overwrite builds it again")
        return 0
    try:
        if options.dataset == "shapes":
            shapes.draw_dataset(options.annotations, options.size or "full")
        builder = build(
            options.dataset,
            videos=options.videos,
            annotations=options.annotations,
            data_dir=options.data_dir,
            form=form,
        )
    except UserError as error:
        print(f"data_prep.build: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "data_prep.build: interrupted; no dataset was stored, the same command starts over",
            file=sys.stderr,
        )
        return 130
    _report(builder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
