"""Places of the videos' bytes: files, members of tar files, and cells of Parquet files."""

import dataclasses
from pathlib import Path

from data_prep.parquet_files import ParquetCell
from data_prep.tar_files import TarMember
from drl_jax.data.video import Span

# Something with `open("rb")`. A few hundred bytes, so it can be sent to other processes.
Location = Path | TarMember | ParquetCell


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """An annotated video on disk: a place, or a span of it in seconds."""

    video_id: str
    location: Location
    span: Span | None


@dataclasses.dataclass
class FoundVideos:
    """What was found: `missing` has reasons by id, and `unannotated` names below the folder."""

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
    """Path below a folder; after that of a tar or Parquet file, a slash and the name or row."""
    name = str(file_of(location).relative_to(folder))
    return name if isinstance(location, Path) else f"{name}/{location.name}"
