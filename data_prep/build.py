"""Builds a dataset: decodes each video once, so that training reads stored frames.

python -m data_prep.build shapes --data_dir=data [--size=smoke]
python -m data_prep.build msrvtt --videos=DIR --annotations=DIR --data_dir=data
python -m data_prep.build custom --videos=DIR --annotations=FILE --data_dir=data
python -m data_prep.build custom --annotations=DIR_OF_TAR_FILES --data_dir=data
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.command import add_source_flags, disk_errors, parse, plan_of, requested_storage
from data_prep.datasets import DRAWN, builder_class, dataset_names
from drl_jax.runtime.cli import Parser, add_ray_flag, run_command
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.worker_pool import OrderedMap, map_in_processes

if TYPE_CHECKING:
    from data_prep.video_folder import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parse(arguments)
    return run_command(
        "data_prep.build",
        lambda: _build(options),
        on_interrupt="decoded videos are kept; rerun the command to continue",
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m data_prep.build", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help=f"{', '.join(dataset_names())}, or that of --plugin")
    add_source_flags(parser, required=False)
    number = f"{', '.join(DRAWN)}: number of videos"
    parser.add_argument("--size", choices=sorted(DRAWN["shapes"]), help=number)
    parser.add_argument("--overwrite", action="store_true", help="rebuild an existing dataset")
    parser.add_argument(
        "--discard_cache",
        action="store_true",
        help="delete the cache of decoded frames after the build; a later build with other"
        " annotations then decodes all videos again",
    )
    add_ray_flag(parser, "decode on")
    options = parse(parser, arguments, dataset_names())
    if options.dataset in DRAWN:
        if options.videos or options.annotations:
            parser.error(f"{options.dataset} draws its own videos: omit --videos and --annotations")
        options.size = options.size or "full"
        source = options.data_dir / "source" / f"{options.dataset}_{options.size}"
        options.videos, options.annotations = source / "videos", source
    elif not options.annotations or (not options.videos and options.dataset != "custom"):
        kind = "FILE" if options.dataset == "custom" else "DIR"
        parser.error(f"{options.dataset} needs --videos=DIR and --annotations={kind}")
    elif options.size:
        parser.error(f"--size is for {', '.join(DRAWN)}")
    return options


def _build(options: argparse.Namespace) -> None:
    from data_prep import dataset_build
    from drl_jax.runtime.lock import LOCK_FILE, locked

    dataset, data_dir = options.dataset, options.data_dir
    target = dataset_build.built_dir(data_dir, dataset, requested_storage(options))
    with disk_errors(data_dir):
        # Without the lock: the answer needs no access for writing.
        if _is_built(target, options):
            return
        # Storage variants of a dataset share a cache, so builds of them exclude each other.
        directory = data_dir / dataset
        with locked(directory / LOCK_FILE, f"the dataset in {directory}"):
            dataset_build.restore_previous(target)
            if not _is_built(target, options):
                _build_locked(options)


def _is_built(target: Path, options: argparse.Namespace) -> bool:
    """Whether there is nothing to do; UserError if a dataset is damaged or of other annotations."""
    from data_prep.manifest import annotation_changes
    from drl_jax.data.records import DESCRIPTIONS, VideoDataset

    if options.overwrite or not target.exists():
        return False
    if not all((target / name).is_file() for name in DESCRIPTIONS):
        raise UserError(f"{target} is not a complete dataset; --overwrite rebuilds it")
    built = VideoDataset(target)
    for name in built.split_names:
        built.split(name)  # Checks its captions.
    if options.dataset not in DRAWN:
        annotations = builder_class(options.dataset).read_annotations(options.annotations)
        named_by_user = options.dataset == "custom"
        changes = annotation_changes(built.manifest, annotations, named_by_user=named_by_user)
        if changes:
            raise UserError(
                f"{target} was built from other annotation files ({', '.join(changes)});"
                " --overwrite rebuilds it"
            )
    print(f"{target} is already built; --overwrite rebuilds it")
    return True


def _build_locked(options: argparse.Namespace) -> None:
    import tensorflow_datasets as tfds

    from data_prep import dataset_build
    from data_prep.quarantine import quarantine_file, read_quarantine

    tfds.disable_progress_bar()
    dataset, data_dir = options.dataset, options.data_dir
    storage = requested_storage(options)
    if dataset in DRAWN:
        builder_class(dataset).draw(options.annotations, options.size)
    quarantine = quarantine_file(data_dir, dataset)
    if reasons := read_quarantine(quarantine):
        print(f"leaving out {len(reasons)} videos listed in {quarantine}")
    plan = plan_of(options, reasons)
    dataset_build.print_plan(dataset, plan, data_dir, storage)
    with _engine(options, plan) as map_calls:
        built = dataset_build.build_dataset(
            dataset,
            plan,
            data_dir,
            storage,
            timeout=options.timeout,
            discard_cache=options.discard_cache,
            map_calls=map_calls,
        )
    dataset_build.print_report(built)


@contextlib.contextmanager
def _engine(options: argparse.Namespace, plan: "Plan") -> Iterator[OrderedMap]:
    """What runs the decoders: processes of this machine, or a cluster whose nodes were checked."""
    if not options.ray or not plan.clips:
        yield map_in_processes
        return
    from data_prep.dataset_build import cache_dir
    from data_prep.decode import decoder_versions
    from data_prep.locations import file_of
    from drl_jax.runtime.cluster import connect

    with connect(options.ray) as cluster:
        cluster.check(
            {"--data_dir": cache_dir(options.data_dir, options.dataset)},
            file_of(plan.clips[0].location),
            packages=("numpy", *decoder_versions()),
            modules=["drl_jax", "data_prep"],
        )
        yield cluster.map


if __name__ == "__main__":
    sys.exit(main())
