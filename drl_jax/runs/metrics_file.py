"""`metrics.jsonl` of a run: every scalar, without TensorFlow."""

import json
from collections.abc import Mapping
from pathlib import Path

from drl_jax.runs.tensorboard import Keep
from drl_jax.runtime.files import naming, write_text

METRICS_FILE = "metrics.jsonl"


class JsonlWriter:
    """Appends scalars to `metrics.jsonl`: one object per write, with "step" and the tags.

    Attributes:
      lines: the objects in the file when it was opened.
    """

    def __init__(self, workdir: Path, keep: Keep):
        """Opens the file and removes the lines that are not kept, or damaged.

        Raises:
          OSError: the file cannot be read or written.
        """
        self._path = workdir / METRICS_FILE
        self.lines: list[dict[str, float]] = []
        damaged = []
        try:
            with naming(self._path):
                text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        for number, line in enumerate(text.splitlines(), start=1):
            values = _parse(line)
            if values is None:
                damaged.append(number)
            elif keep(int(values["step"]), [tag for tag in values if tag != "step"]):
                self.lines.append(values)
        # A crash can truncate the last line.
        if damaged and (damaged[0] != number or text.endswith("\n")):
            print(f"{self._path}: removed {len(damaged)} damaged lines, the first: {damaged[0]}")
        write_text(self._path, "".join(json.dumps(values) + "\n" for values in self.lines))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line.

        Raises:
          OSError: it cannot be written.
        """
        values = {tag: float(value) for tag, value in scalars.items()}
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_scalars(workdir: Path) -> list[dict[str, float]]:
    """The objects of `metrics.jsonl` of a run; none without the file. Damaged lines are left out.

    Raises:
      OSError: the file cannot be read.
    """
    path = workdir / METRICS_FILE
    try:
        with naming(path):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [values for values in map(_parse, lines) if values is not None]


def _parse(line: str) -> dict[str, float] | None:
    """The object of a line; None if it is damaged."""
    try:
        values = json.loads(line)
        return {
            "step": int(values["step"]),
            **{tag: float(values[tag]) for tag in values if tag != "step"},
        }
    except (ValueError, KeyError, TypeError):
        return None
