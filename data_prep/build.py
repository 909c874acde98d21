"""Decodes a dataset once, so that training never opens a video.

python -m data_prep.build shapes --data_dir=data
python -m data_prep.build msrvtt --videos=DIR --annotations=DIR --data_dir=data
python -m data_prep.build custom --videos=DIR --annotations=FILE --data_dir=data
"""

import argparse
import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

# Only builders are used from here on: nothing in this process runs on a device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tensorflow_datasets as tfds

from data_prep import estimate
from data_prep.command import add_source_flags, form_of
from data_prep.datasets import builder_class, dataset_names
from data_prep.manifest import describe_split
from data_prep.quarantine import quarantine_file, read_quarantine
from data_prep.retrieval_builder import DECODE_TIMEOUT, StorageConfig
from data_prep.shapes import shapes_dataset_builder as shapes
from data_prep.video_folder import Plan, make_plan
from drl_jax.data.records import FORMAT_VERSION, MANIFEST
from drl_jax.runtime.errors import UserError, report_errors


def build(
    dataset: str,
    plan: Plan,
    data_dir: Path,
    form: tuple[int, int, str],
    *,
    timeout: float = DECODE_TIMEOUT,
    keep_cache: bool | None = None,
) -> Path:
    """Decodes and stores a dataset. What an earlier build decoded, even a killed one, is used.

    Args:
      dataset: one of `dataset_names()`.
      plan: what to store.
      data_dir: where the dataset goes.
      form: side of the frames in pixels, frames a video at most, and "jpeg" or "raw". A dataset
        that is built already in this form is built again.
      timeout: seconds that a video may take.
      keep_cache: whether decoded frames stay for a later build; None for the dataset's default.

    Returns:
      The dataset's directory.

    Raises:
      UserError: nothing can be built. A dataset that was there before is as it was.
    """
    cls = builder_class(dataset)
    storage = StorageConfig.of(*form)
    target = data_dir / dataset / storage.name / FORMAT_VERSION
    _tidy(target)
    # Not in its place until it is whole: whatever happens, what is built already stays.
    unfinished = target.parent / "unfinished"
    cache = data_dir / "cache" / dataset
    builder = cls(data_dir=unfinished, config=storage, file_format="array_record")
    try:
        builder.store(plan, cache, timeout)
        _replace(target, Path(builder.data_dir))
    except (OSError, RuntimeError) as error:
        # array_record has no error of its own for it.
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise UserError(
            f"no space is left in {data_dir}; free some, and the same command goes on"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if not (cls.KEEPS_CACHE if keep_cache is None else keep_cache):
        shutil.rmtree(cache, ignore_errors=True)
        with contextlib.suppress(OSError):
            cache.parent.rmdir()  # unless other datasets have theirs there
    return target


def _previous(target: Path) -> Path:
    return target.with_name(f"previous.{target.name}")


def _replace(target: Path, new: Path) -> None:
    if target.exists():
        target.rename(_previous(target))
    new.rename(target)
    shutil.rmtree(_previous(target), ignore_errors=True)


def restore_previous(target: Path) -> None:
    """Gives a dataset back whose build was killed just when it moved its result into place."""
    if _previous(target).exists() and not target.exists():
        _previous(target).rename(target)


def _tidy(target: Path) -> None:
    """Removes what a killed build left."""
    restore_previous(target)
    for left in (_previous(target), target.parent / "unfinished"):
        shutil.rmtree(left, ignore_errors=True)


def announce(dataset: str, plan: Plan, data_dir: Path, form: tuple[int, int, str]) -> None:
    """Prints what a build is going to do and how much room that takes, before it starts."""
    stored = estimate.in_words(estimate.stored_bytes(len(plan.clips) * form[1], form))
    print(
        f"{dataset}: {len(plan.clips):,} of {len(plan.annotations.video_ids()):,} annotated videos"
        f" are there; as {StorageConfig.of(*form).name} they take up to {stored}, and the cache of"
        f" decoded frames as much again; {data_dir} has"
        f" {estimate.in_words(estimate.free_bytes(data_dir))} free",
        flush=True,
    )


def report(target: Path) -> None:
    """Prints what was built, from its manifest."""
    manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    for name, use in manifest["missing_files"].items():
        print(f"built without the annotation file {name} ({use}): it is absent")
    print(f"built {target}: {manifest['videos']:,} videos")
    for name, split in manifest["splits"].items():
        print(f"  {describe_split(name, split)}")
    if left_out := manifest["left_out"]:
        print(f"left out {len(left_out)} videos (all in {target / MANIFEST}):")
        for video, reason in list(left_out.items())[:10]:
            print(f"  {video}: {reason}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("data_prep.build", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=dataset_names())
    add_source_flags(parser, required=False)
    parser.add_argument("--size", choices=sorted(shapes.SIZES), help="shapes only: how many clips")
    parser.add_argument("--overwrite", action="store_true", help="build again what is built")
    parser.add_argument(
        "--discard_cache",
        action="store_true",
        help="delete the decoded frames of each video after the build; a later build with other"
        " annotations then decodes all again",
    )
    options = parser.parse_args(arguments)
    if options.dataset == "shapes":
        if options.videos or options.annotations:
            parser.error("shapes draws its own videos: leave out --videos and --annotations")
        source = options.data_dir / "source" / f"shapes_{options.size or 'full'}"
        options.videos, options.annotations = source / "videos", source
    elif not options.videos or not options.annotations:
        kind = "FILE" if options.dataset == "custom" else "DIR"
        parser.error(f"{options.dataset} needs --videos=DIR and --annotations={kind}")
    elif options.size:
        parser.error("--size is for shapes only")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parse(arguments)
    logging.set_verbosity(logging.ERROR)  # TFDS warns of every form it was not shipped with
    tfds.disable_progress_bar()
    form = form_of(options)
    target = options.data_dir / options.dataset / StorageConfig.of(*form).name / FORMAT_VERSION
    restore_previous(target)
    if target.exists() and not options.overwrite:
        print(f"{target} is built already; --overwrite builds it again")
        return 0

    def run() -> int:
        if options.dataset == "shapes":
            shapes.draw_dataset(options.annotations, options.size or "full")
        quarantine = quarantine_file(options.data_dir, options.dataset)
        reasons = read_quarantine(quarantine)
        if reasons:
            print(f"{quarantine} keeps {len(reasons)} videos out")
        annotations = builder_class(options.dataset).read_annotations(options.annotations)
        plan = make_plan(annotations, options.videos, reasons)
        announce(options.dataset, plan, options.data_dir, form)
        built = build(
            options.dataset,
            plan,
            options.data_dir,
            form,
            timeout=options.timeout,
            keep_cache=False if options.discard_cache else None,
        )
        report(built)
        return 0

    return report_errors(
        "data_prep.build", run, "what was decoded is kept, and the same command goes on"
    )


if __name__ == "__main__":
    sys.exit(main())
