"""Validates a dataset before it is built: missing, broken and suspicious videos.

    python -m data_prep.check msrvtt --videos=DIR --annotations=DIR [--data_dir=data]

Exit status: 0 if all annotated videos can be used, 1 if some cannot or could not be read, 2 if the
dataset cannot be checked.
"""

import argparse
import sys
from collections.abc import Sequence

from data_prep.command import add_source_flags, disk_errors, parse, plan_of, requested_storage
from data_prep.datasets import DRAWN, dataset_names
from drl_jax.runtime.cli import Parser, run_command
from drl_jax.runtime.errors import UserError

_NAME = "data_prep.check"


class _CheckError(UserError):
    """The dataset cannot be checked."""

    status = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser(f"python -m {_NAME}", description=__doc__.splitlines()[0])
    names = sorted(set(dataset_names()) - set(DRAWN))
    parser.add_argument("dataset", help=f"{', '.join(names)}, or that of --plugin")
    add_source_flags(parser, required=True)
    options = parse(parser, arguments, names)
    return run_command(_NAME, lambda: _check(options), on_interrupt="nothing was written")


def _check(options: argparse.Namespace) -> int:
    from data_prep import dataset_check
    from data_prep.quarantine import quarantine_file, read_quarantine

    quarantine = quarantine_file(options.data_dir, options.dataset)
    try:
        with disk_errors(options.data_dir):
            read_quarantine(quarantine)  # An error in it should not wait for the end of the check.
            plan = plan_of(options, {})
    except UserError as error:
        raise _CheckError(str(error)) from error
    storage = requested_storage(options)
    report = dataset_check.check_dataset(options.dataset, plan, storage, options.timeout)
    dataset_check.print_report(report)
    try:
        dataset_check.write_report(report, quarantine)
    except OSError as error:
        raise _CheckError(f"cannot write to {quarantine.parent} ({error.strerror})") from error
    print(f"wrote {dataset_check.report_file(quarantine)} and {quarantine}")
    kinds = ("left_out", "missing", "unusable", "unavailable")
    return int(any(report[kind] for kind in kinds))


if __name__ == "__main__":
    sys.exit(main())
