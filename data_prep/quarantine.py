"""The list of videos that a build leaves out: `DATA_DIR/DATASET/quarantine.txt`.

A video and the reason a line, with a tab between them; `python -m data_prep.check` writes it, and
lines may be added or removed by hand.
"""

from collections.abc import Mapping
from pathlib import Path

_HEADER = "# Videos that builds leave out: name, tab, reason. Remove a line to let one in.\n"


def quarantine_file(data_dir: Path, dataset: str) -> Path:
    return data_dir / dataset / "quarantine.txt"


def read_quarantine(path: Path) -> dict[str, str]:
    """Reasons by video; none where there is no such file."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = (line.partition("\t") for line in lines if line.strip() and line[0] != "#")
    return {video.strip(): reason.strip() or "no reason given" for video, _, reason in entries}


def write_quarantine(path: Path, reasons: Mapping[str, str]) -> None:
    """Writes the whole list or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    lines = (f"{video}\t{reason}\n" for video, reason in sorted(reasons.items()))
    unfinished.write_text(_HEADER + "".join(lines), encoding="utf-8")
    unfinished.replace(path)
