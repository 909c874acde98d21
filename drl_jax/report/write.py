"""Writes the report of an evaluated checkpoint to a directory."""

import tempfile
from pathlib import Path

from drl_jax.runs.evaluate_run import Evaluated
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_text

PAGE = "index.html"


class ReportError(UserError):
    """A report that cannot be written."""


def prepare_directory(directory: Path) -> None:
    """Creates the directory of a report, before the work that a report needs.

    Raises:
      ReportError: it cannot be created, or no file can be written to it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ReportError(f"cannot write to --report={directory}: {error.strerror}") from error


def write_report(directory: Path, workdir: Path, evaluated: Evaluated) -> None:
    """Writes `index.html`, and prints where it is.

    Args:
      directory: of the page (`prepare_directory`).
      workdir: directory of the run.
      evaluated: the evaluation.

    Raises:
      UserError: frames cannot be read, or the page cannot be written.
    """
    # matplotlib and Jinja take a second to import, which other evaluations do not need.
    from drl_jax.report.collect import collect
    from drl_jax.report.page import render

    page = render(collect(workdir, evaluated))
    path = directory / PAGE
    try:
        write_text(path, page)
    except OSError as error:
        raise ReportError(
            f"the metrics are complete, but {path} cannot be written: {error.strerror}"
        ) from error
    print(f"report: {path} ({len(page.encode()) / 1e6:.1f} MB)")
