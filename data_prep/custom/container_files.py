"""Which files of your own dataset `--annotations` names, and what is common to all containers."""

import dataclasses
import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePath

from tqdm import tqdm

from data_prep.annotations import AnnotationError, Annotations, Captioned, check_lost
from data_prep.custom.rows import add_row, check_splits, split_of_file
from data_prep.locations import Clip, FoundVideos, Location, name_below
from data_prep.splits import draw_splits
from drl_jax.data.video import Span
from drl_jax.runtime.errors import printable
from drl_jax.runtime.files import files_below

TAR, PARQUET = ".tar", ".parquet"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclasses.dataclass(frozen=True)
class ContainerFiles:
    """Files of one kind that have captions, and may have the videos.

    Attributes:
      named: what `--annotations` is.
      folder: folder above all of them.
      paths: the files, sorted.
    """

    named: Path
    folder: Path
    paths: list[Path]

    @property
    def kind(self) -> str:
        """TAR or PARQUET."""
        return self.paths[0].suffix.lower()

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

    That is a file, a folder, or a pattern such as `shards/*.tar`. Of a folder with both kinds, they
    are the tar files: video2dataset writes its logs beside them, as Parquet files. None if it is
    another file.

    Raises:
      AnnotationError: there is no such file, tar files are compressed, or two files differ in the
        case of their suffix alone.
    """
    if named.is_dir():
        folder, found = named, files_below(named)
    elif named.is_file():
        folder, found = named.parent, [named]
        if not _with_suffix(found, TAR, PARQUET, *_COMPRESSED):
            return None
    else:
        folder = next(p for p in named.parents if glob.escape(str(p)) == str(p))
        found = sorted(p for p in folder.glob(str(named.relative_to(folder))) if p.is_file())
    if packed := _with_suffix(found, *_COMPRESSED):
        raise AnnotationError(
            f"{packed[0]} is a compressed tar file, whose members cannot be read in place; unpack"
            " each to a plain .tar file, e.g. with gunzip (videos are compressed already)"
        )
    paths = _with_suffix(found, TAR) or _with_suffix(found, PARQUET)
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


class ContainedVideos:
    """Collects the videos inside container files, and their captions."""

    def __init__(self, files: ContainerFiles):
        self._files = files
        self._splits: dict[str, dict[str, list[str]]] = {}
        self._found = FoundVideos(files.folder)
        self._hashes: dict[str, str] = {}
        self._left_out: dict[str, str] = {}
        self._digest = hashlib.sha256()

    def add(
        self,
        video_id: str,
        captions: list[str],
        split: str,
        location: Location | None,
        span: Span | None,
        *,
        missing: str = "",
    ) -> None:
        """Adds a video with a new id; without a location, `missing` says why it has none.

        The split may be "".
        """
        # The bytes of a video are not part of it: they may be terabytes.
        size = getattr(location, "size", None)
        content = repr((video_id, captions, split, span, size))
        self._digest.update(content.encode("utf-8", "replace"))
        add_row(self._splits, video_id, captions, split)
        if location is None:
            self._found.missing[video_id] = missing
        else:
            self._found.clips.append(Clip(video_id, location, span))

    def leave_out(self, name: str, reason: str) -> None:
        """Adds a sample or a row that cannot be used."""
        self._left_out[printable(name)] = printable(reason)

    def add_unannotated(self, location: Location) -> None:
        """Adds a video without captions."""
        self._found.unannotated.append(name_below(location, self._files.folder))

    def end_file(self, name: str) -> None:
        """Ends what is added from a file; `name` is that below the folder."""
        self._hashes[name] = self._digest.hexdigest()
        self._digest = hashlib.sha256()

    def annotations(self) -> Annotations:
        """The annotations.

        Raises:
          AnnotationError: some videos have a split and others have none, or too much is left out.
        """
        check_lost(self._left_out, len(self._found.clips), f"videos of {self._files.named}")
        check_splits(self._files.named, self._splits)
        captioned = {
            name: [Captioned(video_id, captions) for video_id, captions in videos.items()]
            for name, videos in self._splits.items()
        }
        annotations = Annotations(
            captioned, hashes=self._hashes, contained=self._found, left_out=self._left_out
        )
        if "" in self._splits:
            draw_splits(annotations)
        return annotations
