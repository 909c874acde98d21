"""Feeds damaged files to the project's readers, and reports what they make of them.

    python -m benchmarks.fuzz [--inputs=300] [--seed=0] [--kinds=videos,index] [--save=DIR]

Accepted are: the same result as without the damage; a refusal in one line; for videos and
annotations another valid result, since damage changes their content; and, for formats without
checksums, changed values of tensors. Anything else is a failure: another error, a silent change, a
crash, more than 10 seconds or 2 GB. Exits with status 1 if there is one.
"""

import argparse
import collections
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Workers inherit it: the readers need no accelerator, and share the machine's processors.
os.environ["JAX_PLATFORMS"] = "cpu"

from tqdm import tqdm

from benchmarks.fuzz import runner
from benchmarks.measure import RESULTS, make_record, names, table
from drl_jax.runtime.cli import Parser, positive_int, run_command
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_json


def fuzz(options: argparse.Namespace) -> None:
    """Runs all inputs and prints the table; raises UserError if one failed."""
    if unknown := set(options.kinds) - set(runner.KINDS):
        raise UserError(f"no kind {min(unknown)}; there are {', '.join(runner.KINDS)}")
    start, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="drl_jax_fuzz") as scratch:
        roots = {kind: Path(scratch) / kind for kind in options.kinds}
        for kind, root in roots.items():
            runner.prepare(kind, root, clips=options.clips)
        found = runner.run_inputs(options.kinds, roots, options.seed, options.inputs)
        total = options.inputs * len(options.kinds)
        for outcome in tqdm(found, total=total, unit="input"):
            outcomes.append(outcome)
            if outcome.status == runner.FAILED:
                where = f"{outcome.kind} {outcome.number}, {outcome.subject}: {outcome.damage}"
                tqdm.write(f"{where}\n  {outcome.detail[:300]!r}")
                if options.save:
                    root = roots[outcome.kind]
                    runner.save_failure(outcome, root, options.seed, options.save)
    rows = []
    for kind in options.kinds:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        counts = collections.Counter(outcome.status for outcome in of_kind)
        row = {"kind": kind, "inputs": len(of_kind), **{s: counts[s] for s in runner.OUTCOMES}}
        rows.append({**row, "slowest seconds": max(outcome.seconds for outcome in of_kind)})
    print(table(rows))
    if options.record:
        settings = {"seed": options.seed, "seconds": round(time.monotonic() - start)}
        write_json(RESULTS / "fuzz.json", make_record("fuzz", rows, **settings))
    if failures := sum(row[runner.FAILED] for row in rows):
        where = f" in {options.save}" if options.save else "; keep them with --save=DIR"
        raise UserError(f"{failures} of {len(outcomes)} inputs failed; they are{where}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser("python -m benchmarks.fuzz", description=__doc__.splitlines()[0])
    inputs = "of each kind (%(default)s)"
    parser.add_argument("--inputs", type=positive_int, default=300, help=inputs)
    parser.add_argument("--seed", type=int, default=0, help="of all choices (%(default)s)")
    kinds = ",".join(runner.KINDS)
    parser.add_argument("--kinds", type=names, default=kinds, help="of inputs (%(default)s)")
    parser.add_argument("--clips", type=Path, help="folder of videos to damage as well")
    parser.add_argument("--save", type=Path, help="directory for inputs that failed")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/fuzz.json")
    options = parser.parse_args(arguments)
    return run_command("benchmarks.fuzz", lambda: fuzz(options))


if __name__ == "__main__":
    sys.exit(main())
