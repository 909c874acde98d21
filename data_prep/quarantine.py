"""List of videos that a build leaves out: `DATA_DIR/DATASET/quarantine.txt`.

One video per line: id, tab, reason. Lines that start with # are comments; an id that starts with #
has a backslash before it. `python -m data_prep.check` writes the file; lines may be added or
removed by hand.
"""

from collections.abc import Mapping
from pathlib import Path

from data_prep.annotations import AnnotationError
from drl_jax.runtime.files import write_text

_HEADER = "# Videos that builds leave out: id, tab, reason. Remove a line to include its video.\n"


def quarantine_file(data_dir: Path, dataset: str) -> Path:
    """Path of a dataset's quarantine list, which may not exist."""
    return data_dir / dataset / "quarantine.txt"


def read_quarantine(path: Path) -> dict[str, str]:
    """The reasons by video id; empty if the file does not exist."""
    if not path.exists():
        return {}
    if not path.is_file():
        raise AnnotationError(f"{path} must be a text file; move away what has its name")
    try:
        # Notepad writes a byte order mark. Lines end with \n alone: an id may have other ends.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path} is not text in UTF-8; save it as UTF-8") from error
    reasons = {}
    for line in lines:
        if line.strip("\t ") and line[0] != "#":
            video, _, reason = line.partition("\t")
            video = video.strip()
            if video.startswith("\\") and video.lstrip("\\").startswith("#"):
                video = video[1:]
            reasons[video] = reason.strip() or "no reason given"
    return reasons


def write_quarantine(path: Path, reasons: Mapping[str, str]) -> None:
    """Writes the list of reasons by video id atomically."""
    lines = []
    for video, reason in sorted(reasons.items()):
        escape = "\\" if video.lstrip("\\").startswith("#") else ""
        lines.append(f"{escape}{video}\t{reason}\n")
    write_text(path, _HEADER + "".join(lines))
