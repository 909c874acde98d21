"""The report of a run: one HTML page that shows what an evaluation found."""

import tempfile
from pathlib import Path

from drl_jax.runs.evaluate_run import Evaluated
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.files import write_text

PAGE = "index.html"


def prepare_directory(directory: Path) -> None:
    """Creates a directory; raises Unavailable if no file can be written to it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise Unavailable(directory, error, "written") from error


def write_report(directory: Path, workdir: Path, evaluated: Evaluated) -> None:
    """Writes `index.html`; UserError: frames cannot be read, or the page cannot be written."""
    # matplotlib and Jinja take a second to import, which other evaluations do not need.
    from drl_jax.report.collect import collect
    from drl_jax.report.page import render

    page = render(collect(workdir, evaluated))
    path = directory / PAGE
    try:
        write_text(path, page)
    except OSError as error:
        reason = Unavailable(path, error, "written")
        raise UserError(f"the metrics are complete, but {reason}") from error
    print(f"report: {path} ({len(page.encode()) / 1e6:.1f} MB)")
