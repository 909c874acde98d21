"""Several indexes that open as one.

A joined index is a directory with one file, which lists its shards: indexes of other directories.
They stay where they are, are updated on their own, and nothing of them is copied. An index that is
not joined has one part, itself; a joined one has a part for each shard.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drl_jax.runtime.files import seal, unseal, write_json
from drl_jax.search.database_file import database_path, index_version
from drl_jax.search.rows import SearchIndexError
from drl_jax.search.store import Store
from drl_jax.search.video_files import Shard

_FILE = "shards.json"
_FORMAT = 1
# Fields of the header in which shards must agree, and their names in messages.
_SHARED = {
    "fingerprint": "model",
    "storage": "--storage",
    "bank": "captions of weak matches (the dataset of the model is at hand for one of them only)",
    "hubness": "--bank",
}


class JoinReport(NamedTuple):
    """Result of `join`.

    Attributes:
      shards: their number.
      videos: files of all shards, including those that cannot be searched.
      windows: of all videos.
      missing: shards that the others belong to, and that were not given, e.g. "3/16".
    """

    shards: int
    videos: int
    windows: int
    missing: list[str]


def is_joined(directory: Path) -> bool:
    """Whether a directory is a joined index."""
    return (directory / _FILE).is_file()


def part_directories(directory: Path) -> list[Path]:
    """The directories of the parts of an index: its own, or those of its shards.

    Raises:
      SearchIndexError: the list of shards is damaged.
    """
    if not is_joined(directory):
        return [directory]
    try:
        listed = unseal((directory / _FILE).read_text(encoding="utf-8"))
        if listed["format"] != _FORMAT:
            raise ValueError(f"it has format {listed['format']}, this version reads {_FORMAT}")
        return [_normal(directory / shard) for shard in listed["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SearchIndexError(
            f"{directory / _FILE} is damaged ({reason}); {_remedy(directory)}"
        ) from error


def part_versions(directory: Path) -> dict[Path, tuple[int, ...]]:
    """The directories of the parts of an index, with `index_version` of each.

    Raises:
      SearchIndexError: see `part_directories`.
    """
    return {part: index_version(part) for part in part_directories(directory)}


def check_present(directory: Path, part: Path) -> None:
    """Checks that a part of an index is there.

    Raises:
      SearchIndexError: it is a shard that is missing.
    """
    if part != directory and not database_path(part).is_file():
        raise SearchIndexError(
            f"the index {directory} joins the shard {part}, which is not there: it was moved or"
            f" deleted, or its disk is not mounted; bring it back, or {_remedy(directory)}"
        )


def check_alike(parts: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Checks that indexes can be searched as one.

    Args:
      parts: directory and header of each.

    Raises:
      SearchIndexError: they differ in what their features depend on.
    """
    (first, wanted), *others = parts
    for directory, header in others:
        for name, what in _SHARED.items():
            if header.get(name) != wanted.get(name):
                raise SearchIndexError(
                    f"the indexes {first} and {directory} cannot be joined: they differ in their"
                    f" {what}; index one of them again"
                )
    # An index has no arrays before its first video.
    described = [(directory, _rows_of(header)) for directory, header in parts if header["arrays"]]
    for (one, arrays), (other, others_arrays) in itertools.pairwise(described):
        if arrays != others_arrays:
            raise SearchIndexError(
                f"the indexes {one} and {other} cannot be joined: they differ in their arrays"
                " (versions of this program made them); index one of them again"
            )


def check_distinct(directories: Sequence[Path]) -> None:
    """Checks that no file is in two of several indexes.

    Raises:
      SearchIndexError: one is.
    """
    seen: dict[str, Path] = {}
    if _are_disjoint(directories):
        return
    for directory in directories:
        with Store(directory) as store:
            folder = store.header["videos"]
            for path in store.paths():
                other = seen.setdefault(f"{folder}/{path}", directory)
                if other is not directory:
                    raise SearchIndexError(
                        f"the video {path} is in two shards, {other} and {directory}; index one of"
                        " them again without it, or join the others without that shard"
                    )


def join(directory: Path, shards: Sequence[Path]) -> JoinReport:
    """Writes an index that opens several others as one; an existing list is replaced.

    Args:
      directory: of the joined index; created if it does not exist.
      shards: directories of the others.

    Raises:
      SearchIndexError: a shard is no index, or twice there, they are not alike, a video is in two
        of them, or the directory is an index of its own, or cannot be written.
    """
    if database_path(directory).exists():
        raise SearchIndexError(f"{directory} is an index with videos; give another --index")
    shards = [_normal(shard) for shard in shards]
    headers, videos, windows = [], 0, 0
    for shard in shards:
        if is_joined(shard):
            raise SearchIndexError(f"{shard} is a joined index; name its shards instead")
        with Store(shard) as store:
            headers.append(store.header)
            _, counts = store.slots()
            windows += int(counts.sum())
            videos += store.count()
    for one, other in itertools.combinations(shards, 2):
        if one.resolve() == other.resolve():
            raise SearchIndexError(f"{other} is named twice; name each shard once")
    check_alike(list(zip(shards, headers, strict=True)))
    check_distinct(shards)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        listed = [_written(directory, shard) for shard in shards]
        write_json(directory / _FILE, seal({"format": _FORMAT, "shards": listed}))
    except OSError as error:
        raise SearchIndexError(f"cannot write to --index={directory}: {error.strerror}") from error
    return JoinReport(len(shards), videos, windows, _missing(headers))


def common_folder(headers: Sequence[Mapping[str, Any]]) -> tuple[Path, list[str]]:
    """The folder of the videos of several indexes, and what it has before the paths of each.

    Returns:
      The deepest folder that has all of theirs, and for each index "" or e.g. "disk1/videos/".
    """
    folders = [header["videos"] for header in headers]
    root = os.path.commonpath(folders)
    relative = [os.path.relpath(folder, root) for folder in folders]
    return Path(root), ["" if path == "." else f"{path}/" for path in relative]


def _rows_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """What arrays of a header hold, without the names of their files."""
    return {n: (array["dtype"], array["shape"]) for n, array in header["arrays"].items()}


def _are_disjoint(directories: Sequence[Path]) -> bool:
    """Whether indexes are different shards of one folder, which have no file in common."""
    known = set()
    for directory in directories:
        with Store(directory) as store:
            known.add((store.header["videos"], store.header.get("shard")))
    numbers = {Shard.parse(shard).number for _, shard in known if shard}
    counts = {(folder, shard and Shard.parse(shard).count) for folder, shard in known}
    return len(numbers) == len(directories) and len(counts) == 1


def _missing(headers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Shards that belong to some of the given ones."""
    given = {Shard.parse(header["shard"]) for header in headers if header.get("shard")}
    wanted = {Shard(number, shard.count) for shard in given for number in range(shard.count)}
    return [str(shard) for shard in sorted(wanted - given)]


def _written(directory: Path, shard: Path) -> str:
    """A shard as it is listed: relative if it lies beside the list, so that both can be moved."""
    whole, shard = directory.resolve().parent, shard.resolve()
    if shard.is_relative_to(whole):
        return os.path.relpath(shard, directory.resolve())
    return str(shard)


def _normal(path: Path) -> Path:
    return Path(os.path.normpath(path))


def _remedy(directory: Path) -> str:
    return (
        "join the shards again with: python -m drl_jax.search join"
        f" --index={directory} SHARD SHARD ..."
    )
