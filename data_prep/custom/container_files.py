"""Your own dataset in tar files or Parquet files: which files, and what both kinds share."""

import dataclasses
import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from tqdm import tqdm

from data_prep.annotations import AnnotationError, Annotations, RowError, check_lost
from data_prep.custom.rows import (
    annotations_of,
    captions_of,
    has_caption,
    span_of,
    split_of,
    split_of_file,
)
from data_prep.locations import Clip, FoundVideos, Location, name_below
from drl_jax.runtime.errors import printable
from drl_jax.runtime.files import files_below

PARQUET = ".parquet"
# `read_members` refuses those that are compressed.
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclasses.dataclass(frozen=True)
class ContainerFiles:
    """Files of one kind, sorted, that `--annotations` names, and the folder above all of them."""

    named: Path
    folder: Path
    paths: list[Path]

    @property
    def are_tables(self) -> bool:
        """Whether they are Parquet files; otherwise tar files."""
        return self.paths[0].suffix.lower() == PARQUET

    def each(self) -> Iterator[tuple[Path, str, str]]:
        """Yields each file, its name below the folder, and the split that its path names, or "".

        The split does not depend on how `--annotations` is written, e.g. as "." in the folder.
        """
        folder = self.folder if self.folder.name not in ("", "..") else self.folder.resolve()
        # Short work shows no bar.
        for path in tqdm(self.paths, "reading annotations", unit="file", delay=2):
            inner = path.relative_to(self.folder)
            yield path, inner.as_posix(), split_of_file(PurePath(folder.name) / inner)


def find_containers(named: Path) -> ContainerFiles | None:
    """Finds the tar files or the Parquet files that `--annotations` names.

    That is a file, a folder, or a pattern such as `shards/*.tar`; None if it is another file. Of
    both kinds, the tar files: video2dataset writes its logs beside them, as Parquet files.
    """
    if named.is_dir():
        folder, found = named, files_below(named)
    elif named.is_file():
        folder, found = named.parent, [named]
        if not _with_suffix(found, *_TAR, PARQUET):
            return None
    else:
        folder = next(p for p in named.parents if glob.escape(str(p)) == str(p))
        found = sorted(p for p in folder.glob(str(named.relative_to(folder))) if p.is_file())
    paths = _with_suffix(found, *_TAR) or _with_suffix(found, PARQUET)
    stems: dict[Path, Path] = {}
    for path in paths:
        if (other := stems.setdefault(path.with_suffix(""), path)) != path:
            raise AnnotationError(
                f"{other} and {path} would give their videos the same ids; rename one"
            )
    if paths:
        return ContainerFiles(named, folder, paths)
    if not named.exists() and glob.escape(str(named)) == str(named):
        raise AnnotationError(
            f"no file {named}; --annotations must be a .csv or .jsonl file, or .tar or .parquet"
            " files or their folder"
        )
    raise AnnotationError(
        f"no .tar file and no .parquet file in {named}; to read a .csv or .jsonl file,"
        " --annotations must be the file"
    )


def _with_suffix(paths: list[Path], *suffixes: str) -> list[Path]:
    return [path for path in paths if path.name.lower().endswith(suffixes)]


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A video inside a file: its fields and the place of its bytes, or why there are none.

    `where` is its place for error messages, and `name` that in the list of what is left out.
    """

    video_id: str
    where: str
    name: str
    row: dict[str, Any] | RowError
    location: Location | str


def contained_annotations(
    files: ContainerFiles, read: Callable[[Path, str], Iterable[Sample]], hint: str = ""
) -> Annotations:
    """Annotations from the samples that `read` yields for each file and its name below the folder.

    A video without a caption is not annotated; a sample that cannot be used is left out.
    """
    found, hashes, left_out = FoundVideos(files.folder), {}, {}
    splits: dict[str, dict[str, list[str]]] = {}
    for path, name, split_of_path in files.each():
        digest = hashlib.sha256()
        for sample in read(path, name):
            row, location = sample.row, sample.location
            try:
                if isinstance(row, RowError):
                    raise row
                if not has_caption(row):
                    if not isinstance(location, str):
                        found.unannotated.append(name_below(location, files.folder))
                    continue
                captions, span = captions_of(row), span_of(row)
            except RowError as error:
                left_out[printable(sample.name)] = printable(str(error))
                continue
            split = split_of(row, sample.where) or split_of_path
            # The bytes of a video are not part of the hash: they may be terabytes.
            content = (sample.video_id, captions, split, span, getattr(location, "size", None))
            digest.update(repr(content).encode("utf-8", "replace"))
            splits.setdefault(split, {})[sample.video_id] = captions
            if isinstance(location, str):
                found.missing[sample.video_id] = location
            else:
                found.clips.append(Clip(sample.video_id, location, span))
        hashes[name] = digest.hexdigest()
    if not found.clips and not left_out:
        raise AnnotationError(f"{files.named} has no video with a caption{hint}")
    check_lost(left_out, len(found.clips), f"videos of {files.named}")
    return annotations_of(files.named, splits, hashes=hashes, contained=found, left_out=left_out)
