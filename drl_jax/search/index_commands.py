"""The subcommands `index` and `join` of `python -m drl_jax.search`."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from drl_jax.model_flags import required_model
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError, printable
from drl_jax.search.indexing import IndexReport, update_index
from drl_jax.search.joined import join
from drl_jax.search.video_files import Shard

if TYPE_CHECKING:
    from drl_jax.runtime.ray_cluster import RayCluster

# Missing shards that are named.
_SHOWN = 20


def index_videos(options: argparse.Namespace) -> None:
    """Creates or updates an index."""
    shard = None if options.shard is None else Shard.parse(options.shard)
    with _cluster(options.ray) as cluster:
        model = required_model(options)
        report = update_index(
            model,
            options.videos,
            options.index,
            storage=options.storage,
            timeout=options.timeout,
            prune=options.prune,
            bank=_bank_captions(options.bank, model) if options.bank else (),
            only=options.only,
            shard=shard,
            cluster=cluster,
        )
    print(_format_report(report, options.index, options.storage))
    if report.unavailable:
        raise UserError(
            f"{len(report.unavailable)} files could not be read, which may pass; rerun the command"
            " to try them again"
        )


def join_shards(options: argparse.Namespace) -> None:
    """Writes an index that opens others as one."""
    report = join(options.index, options.shards)
    print(
        f"{options.index}: {report.shards} shards with {report.videos} files and"
        f" {report.windows} windows open as one"
    )
    if report.missing:
        shown, more = report.missing[:_SHOWN], len(report.missing) - _SHOWN
        rest = f" and {more} more" if more > 0 else ""
        print(f"shards that were not given: {' '.join(shown)}{rest}")


def _cluster(address: str | None) -> "contextlib.AbstractContextManager[RayCluster | None]":
    """The cluster that `--ray` names, if any."""
    if not address:
        return contextlib.nullcontext()
    import jax

    from drl_jax.runtime.cluster import connect

    # The GPUs are for the processes that encode: this one only compares models.
    jax.config.update("jax_platforms", "cpu")
    return connect(address)


def _bank_captions(bank: str, model: RetrievalModel) -> list[str]:
    """Captions of the training split of a model's dataset, or of a file."""
    if bank != "train":
        return read_lines(Path(bank))
    # The libraries of datasets take half a second to import, and a query needs none.
    from drl_jax.data.batches import load_split
    from drl_jax.data.records import DatasetError, VideoDataset, dataset_dir
    from drl_jax.runs.post_processing_run import draw_bank

    config = model.config
    try:
        train = load_split(VideoDataset(dataset_dir(config)), "train", config.data)
    except DatasetError as error:
        raise UserError(
            f"--bank=train: {error}; or give --bank=FILE, with one caption per line"
        ) from error
    return [caption for caption in draw_bank(train, None).captions if caption.strip()]


def _format_report(report: IndexReport, directory: Path, storage: str) -> str:
    lines = [
        f"{directory}: {report.added} added, {report.changed} changed, {report.moved} moved,"
        f" {report.removed} removed, {report.unchanged} unchanged; {report.windows} windows take"
        f" {report.nbytes / 1e6:.1f} MB ({storage})"
    ]
    if report.bad:
        lines.append(f"{len(report.bad)} files cannot be searched:")
        lines += [f"  {printable(path)}: {reason}" for path, reason in report.bad.items()]
    if report.unavailable:
        lines.append(f"{len(report.unavailable)} files could not be read this time:")
        lines += [f"  {printable(path)}: {why}" for path, why in report.unavailable.items()]
    if report.skipped:
        lines.append(f"{len(report.skipped)} names are no files (links to nothing, pipes):")
        lines += [f"  {printable(path)}" for path in report.skipped]
    return "\n".join(lines)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
      UserError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as lines of text ({error})") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path} has no lines")
    return lines
