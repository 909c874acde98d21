"""Builds a dataset: decodes its videos once and stores the frames."""

import contextlib
import shutil
from pathlib import Path

import tensorflow_datasets as tfds

from data_prep.datasets import builder_class
from data_prep.quarantine import quarantine_file
from data_prep.sizes import describe_split, format_bytes, stored_bytes
from data_prep.splits import warnings
from data_prep.video_folder import Plan
from drl_jax.data.records import FORMAT_VERSION, MANIFEST, read_manifest
from drl_jax.data.storage import StorageSpec
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.worker_pool import OrderedMap, map_in_processes


def built_dir(data_dir: Path, dataset: str, storage: StorageSpec) -> Path:
    """Directory of a built dataset; it may not exist yet."""
    return data_dir / dataset / storage.name / FORMAT_VERSION


def cache_dir(data_dir: Path, dataset: str) -> Path:
    """Directory of the cache of decoded frames; it may not exist yet."""
    return data_dir / "cache" / dataset


def build_dataset(
    dataset: str,
    plan: Plan,
    data_dir: Path,
    storage: StorageSpec,
    *,
    timeout: float,
    discard_cache: bool = False,
    map_calls: OrderedMap = map_in_processes,
) -> Path:
    """Decodes and stores a dataset, and replaces an existing one with the same storage.

    Frames decoded by an earlier build, even one that was killed, are reused. The caller holds the
    lock of the dataset. `timeout` and `map_calls` are as in `decode_clips`; `discard_cache` deletes
    the cache of decoded frames after the build. Returns the directory.

    Raises:
      UserError: nothing can be built, or a video could not be decoded for a reason that may pass.
        An existing dataset is unchanged.
      OSError, RuntimeError: the disk is full or cannot be written (`disk_errors`). The same.
    """
    cls = builder_class(dataset)
    target = built_dir(data_dir, dataset, storage)
    # Moved to `target` when it is complete, so that a failure leaves the existing dataset in place.
    unfinished = target.parent / "unfinished"
    restore_previous(target)
    for leftover in (_previous(target), unfinished):  # Of a build that was killed.
        _remove(leftover)
    cache = cache_dir(data_dir, dataset)
    config = tfds.core.BuilderConfig(name=storage.name)
    builder = cls(data_dir=unfinished, config=config, file_format="array_record")
    try:
        if unavailable := builder.store(plan, cache, timeout, map_calls):
            for video, reason in unavailable.items():
                print(f"{video}: {reason}")
            raise UserError(
                f"{len(unavailable)} of {len(plan.clips)} videos could not be decoded, which may"
                " not be their fault; the frames of the others are kept: rerun the command to try"
                " these again (with a larger --timeout if they take too long), or leave them out"
                f" with a line for each id in {quarantine_file(data_dir, dataset)}"
            )
        if target.exists():
            target.rename(_previous(target))
        Path(builder.data_dir).rename(target)
        _remove(_previous(target))
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if discard_cache:
        shutil.rmtree(cache, ignore_errors=True)
        with contextlib.suppress(OSError):
            cache.parent.rmdir()  # Fails if it has the caches of other datasets.
    return target


def restore_previous(target: Path) -> None:
    """Restores a dataset whose build was killed while it moved its result to `target`."""
    if _previous(target).exists() and not target.exists():
        _previous(target).rename(target)


def _previous(target: Path) -> Path:
    return target.with_name(f"previous.{target.name}")


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():  # Not from a build, but it would block the next one.
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def print_plan(dataset: str, plan: Plan, data_dir: Path, storage: StorageSpec) -> None:
    """Prints the number of videos and the disk space of a build before it starts, and warnings."""
    absolute = data_dir.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    stored = format_bytes(stored_bytes(len(plan.clips) * storage.max_frames, storage))
    has_cache = builder_class(dataset).HAS_CACHE
    cached = ", and the cache of decoded frames the same again" if has_cache else ""
    print(
        f"{dataset}: found {len(plan.clips):,} of {len(plan.annotations.video_ids()):,} annotated"
        f" videos; {storage.name} takes up to {stored}{cached}; {data_dir} has"
        f" {format_bytes(free)} free",
        flush=True,
    )
    if plan.annotations.contained is not None and plan.unannotated:
        print(f"{len(plan.unannotated):,} videos without a caption are not stored", flush=True)
    if left_out := plan.annotations.left_out:
        place, reason = next(iter(left_out.items()))
        print(f"{len(left_out):,} rows are left out (the first: {place}: {reason})", flush=True)
    for line in warnings(plan.annotations, plan.merged, builder_class(dataset).PROTOCOLS):
        print(line, flush=True)


def print_report(target: Path) -> None:
    """Prints the contents of a built dataset from its manifest."""
    manifest = read_manifest(target)
    for name, purpose in manifest["missing_files"].items():
        print(f"built without the annotation file {name} ({purpose}): not found")
    print(f"built {target}: {manifest['videos']:,} videos")
    for name, split in manifest["splits"].items():
        print(f"  {describe_split(name, split)}")
    if left_out := manifest["left_out"]:
        print(f"left out {len(left_out)} videos and rows (full list: {target / MANIFEST}):")
        for video, reason in list(left_out.items())[:10]:
            print(f"  {video}: {reason}")
