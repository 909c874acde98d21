"""List of videos that a build leaves out: `DATA_DIR/DATASET/quarantine.txt`.

One video per line: id, tab, reason. `python -m data_prep.check` writes the file; lines may be added
or removed by hand.
"""

from collections.abc import Mapping
from pathlib import Path

from drl_jax.runtime.files import write_text

_HEADER = "# Videos that builds leave out: id, tab, reason. Remove a line to include its video.\n"


def quarantine_file(data_dir: Path, dataset: str) -> Path:
    """Path of a dataset's quarantine list, which may not exist."""
    return data_dir / dataset / "quarantine.txt"


def read_quarantine(path: Path) -> dict[str, str]:
    """Reads the reasons by video id; empty if the file does not exist."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = (line.partition("\t") for line in lines if line.strip() and line[0] != "#")
    return {video.strip(): reason.strip() or "no reason given" for video, _, reason in entries}


def write_quarantine(path: Path, reasons: Mapping[str, str]) -> None:
    """Writes the list atomically.

    Args:
      path: the file.
      reasons: reason for each video, by video id.
    """
    lines = (f"{video}\t{reason}\n" for video, reason in sorted(reasons.items()))
    write_text(path, _HEADER + "".join(lines))
