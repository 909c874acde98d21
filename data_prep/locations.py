"""Places of the videos' bytes: files, members of tar files, and cells of Parquet files."""

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path

from data_prep.parquet_files import ParquetCell, ParquetTable
from data_prep.tar_files import TarMember, read_members
from drl_jax.data.video import Span

# Something with `open("rb")`. A few hundred bytes, so it can be sent to other processes.
Location = Path | TarMember | ParquetCell


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """An annotated video on disk.

    Attributes:
      video_id: id of the video.
      location: its file, or its place inside one.
      span: start and end in seconds; None: the whole video.
    """

    video_id: str
    location: Location
    span: Span | None


@dataclasses.dataclass
class FoundVideos:
    """What was found of the videos of a dataset.

    Attributes:
      folder: folder of the video files, or of the files that contain the videos.
      clips: the annotated videos that were found.
      missing: reasons for the other annotated videos, by id.
      unannotated: names, below the folder, of videos without annotation.
    """

    folder: Path
    clips: list[Clip] = dataclasses.field(default_factory=list)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    unannotated: list[str] = dataclasses.field(default_factory=list)


def file_of(location: Location) -> Path:
    """The file that has the bytes."""
    return location if isinstance(location, Path) else location.path


def absolute(location: Location) -> Location:
    """The same location for a process with another working directory."""
    if isinstance(location, Path):
        return location.absolute()
    return dataclasses.replace(location, path=location.path.absolute())


def name_below(location: Location, folder: Path) -> str:
    """Name of a location, which `find_locations` finds: its path below a folder.

    That of a member is the path of the tar file, a slash and its name; that of a cell the path of
    the Parquet file, a slash and the number of the row.
    """
    name = str(file_of(location).relative_to(folder))
    return name if isinstance(location, Path) else f"{name}/{location.name}"


def find_locations(folder: Path, names: Iterable[str]) -> list[Location]:
    """The locations with these names below a folder; files that do not exist where there are none.

    Raises:
      UserError: a tar file or Parquet file is damaged.
      OSError: it cannot be read.
    """
    found: list[Location] = []
    opened, inside = None, {}
    for name in names:
        file, inner = _split(folder, name)
        if inner and file != opened:  # Names of one file follow each other.
            opened, inside = file, _inside(file)
        found.append(inside.get(inner, folder / name) if inner else folder / name)
    return found


def _split(folder: Path, name: str) -> tuple[Path, str]:
    """A tar or Parquet file, and what is named inside it; nothing if it is a file of its own."""
    for end in (number for number, character in enumerate(name) if character == "/"):
        file = folder / name[:end]
        if file.suffix.lower() in (".tar", ".parquet") and file.is_file():
            return file, name[end + 1 :]
    return folder / name, ""


def _inside(file: Path) -> dict[str, Location]:
    if file.suffix.lower() == ".parquet":
        with contextlib.closing(ParquetTable(file)) as table:
            return {cell.name: cell for cell in table.cells()}
    return {
        member.name: TarMember(file, member.name, member.offset_data, member.size)
        for member, _ in read_members(file)
        if not member.issparse()
    }
