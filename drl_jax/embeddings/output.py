"""The files of one output of embeddings: their names, and what a later run may keep of them.

`NAME.npz`, or `NAME-00000-of-00012.npz` and so on where there are several, and `NAME.npz.json`, the
report: what they were made of and with, the files that are finished, and what could not be read.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.embeddings import SUFFIXES
from drl_jax.embeddings.formats import write_arrays
from drl_jax.runtime.errors import Unavailable, UserError, raise_if_refused
from drl_jax.runtime.files import write_json
from drl_jax.runtime.lock import locked


def check_out(out: Path) -> None:
    """Checks the name of an output.

    Raises:
      UserError: its suffix is unknown, or its directory does not exist.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out={out}: the formats are {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.parent}")


class Output:
    """Files that this process alone writes; a context manager.

    Attributes:
      files: all files, in the order of the inputs.
      report: path of the report.
      spool: directory for temporary files; exists while the context is open.
    """

    def __init__(
        self,
        out: Path,
        made_with: Mapping[str, Any],
        inputs: int,
        shard_size: int,
        unusable: Mapping[str, str] | None = None,
    ):
        """Writes nothing.

        Args:
          out: path of the output, see `check_out`.
          made_with: everything that the content of the files depends on, by a name for messages.
          inputs: number of captions or videos.
          shard_size: inputs per file.
          unusable: why other names could be no inputs, for the report.
        """
        count = -(-inputs // shard_size)
        self.files = [out]
        if count > 1:
            names = (f"{out.stem}-{n:05d}-of-{count:05d}{out.suffix}" for n in range(count))
            self.files = [out.with_name(name) for name in names]
        self.report, self.spool = (
            out.with_name(f"{out.name}.{end}") for end in ("json", "unfinished")
        )
        self._out, self._made_with = out, {**made_with, "--shard_size": shard_size}
        self._inputs, self._shard_size = inputs, shard_size
        self._unusable = dict(unusable or {})
        # By name: rows, bytes, and with the reasons what cannot be read, and could not this time.
        self._finished: dict[str, dict[str, Any]] = {}
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> "Output":
        """Locks the output and reads the report.

        Raises:
          UserError: another process writes it, or there are files of another origin.
        """
        with self._resources:
            lock = self._out.with_name(f"{self._out.name}.lock")
            self._resources.enter_context(locked(lock, f"the output {self._out}"))
            self._finished = self._read_report()
            self._remove_unfinished()
            self._write_report()
            self.spool.mkdir()
            self._resources.callback(shutil.rmtree, self.spool, ignore_errors=True)
            self._resources = self._resources.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def pending(self) -> Iterator[tuple[Path, range]]:
        """The files that are not finished, each with the numbers of its inputs.

        Those with an input that could not be read this time are made again.
        """
        for number, file in enumerate(self.files):
            known = self._finished.get(file.name)
            is_finished = known is not None and not known["unavailable"]
            if not is_finished or not file.is_file() or file.stat().st_size != known["bytes"]:
                first = number * self._shard_size
                yield file, range(first, min(first + self._shard_size, self._inputs))

    def write(
        self,
        file: Path,
        arrays: dict[str, np.ndarray],
        about: str,
        unreadable: dict[str, str],
        unavailable: dict[str, str],
    ) -> None:
        """Writes a file, and what could not be read of its inputs to the report.

        Raises:
          UserError: it cannot be written.
        """
        size = write_arrays(file, arrays, about)
        rows = len(next(iter(arrays.values())))
        self._finished[file.name] = {
            "rows": rows,
            "bytes": size,
            "unreadable": unreadable,
            "unavailable": unavailable,
        }
        self._write_report()

    @property
    def rows(self) -> int:
        """Rows of all finished files."""
        return sum(file["rows"] for file in self._finished.values())

    @property
    def nbytes(self) -> int:
        """Size of all finished files."""
        return sum(file["bytes"] for file in self._finished.values())

    @property
    def unreadable(self) -> dict[str, str]:
        """Why inputs could not be read, by name; also of names that could be no inputs."""
        found = dict(self._unusable)
        for file in self.files:
            known = self._finished.get(file.name, {})
            found |= known.get("unreadable", {}) | known.get("unavailable", {})
        return found

    def _read_report(self) -> dict[str, dict[str, Any]]:
        """The finished files of an earlier run with the same inputs."""
        try:
            report = json.loads(self.report.read_text(encoding="utf-8"))
            made_with = dict(report["made_with"])
            finished = {
                name: {
                    "rows": int(file["rows"]),
                    "bytes": int(file["bytes"]),
                    "unreadable": dict(file["unreadable"]),
                    "unavailable": dict(file.get("unavailable", {})),
                }
                for name, file in report["files"].items()
            }
        except FileNotFoundError as error:
            if existing := [file for file in self.files if file.exists()]:
                raise UserError(
                    f"{existing[0]} exists, and {self.report} does not: move it away, or give"
                    " another --out"
                ) from error
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise_if_refused(self.report, error)
            raise UserError(
                f"{self.report} is damaged, or no report; move it and its files away, or give"
                " another --out"
            ) from error
        for name, value in self._made_with.items():
            # A run that finished no file binds no other one.
            if finished and made_with.get(name) != value:
                raise UserError(
                    f"{self._out} was made with another {name}; give another --out, or move its"
                    f" files and {self.report.name} away"
                )
        return finished

    def _remove_unfinished(self) -> None:
        """Removes what a process that was killed left behind."""
        shutil.rmtree(self.spool, ignore_errors=True)
        names = {file.name for file in (*self.files, self.report)}
        for part in self._out.parent.glob("*.part"):
            if part.name.rsplit(".", 2)[0] in names:
                part.unlink(missing_ok=True)

    def _write_report(self) -> None:
        files = {
            file.name: self._finished[file.name]
            for file in self.files
            if file.name in self._finished
        }
        report = {"made_with": self._made_with, "unusable": self._unusable, "files": files}
        try:
            write_json(self.report, report)
        except OSError as error:
            raise Unavailable(self.report, error, "written") from error
