"""Compares two runs on the same queries: is the difference more than luck?

python -m drl_jax.compare RUN_A RUN_B [--split=test] [--checkpoint=best|latest|STEP]
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drl_jax import CallableModule
from drl_jax.runtime.cli import Parser, add_plugin_flag, positive_int, run_command
from drl_jax.runtime.errors import as_path

if TYPE_CHECKING:
    from drl_jax.runs.compare_run import Comparison


def compare(
    one: str | os.PathLike,
    other: str | os.PathLike,
    *,
    checkpoint: str | int = "best",
    split: str = "test",
    rerank: int = 0,
    data_dir: str | None = None,
) -> "Comparison":
    """Compares two runs on the same queries; arguments and errors as of `compare_run.compare`."""
    from drl_jax.runs import compare_run

    what = {"checkpoint": str(checkpoint), "split_name": split, "data_dir": data_dir}
    return compare_run.compare(
        *(as_path(run, "a run") for run in (one, other)), rerank=rerank, **what
    )


def _parser() -> Parser:
    parser = Parser("python -m drl_jax.compare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("one", type=Path, metavar="RUN_A", help="directory of a run")
    add("other", type=Path, metavar="RUN_B", help="directory of another run")
    add("--checkpoint", default="best", help="of both: best, latest or a step (%(default)s)")
    add("--split", default="test", help="train, val, test or a stored split (%(default)s)")
    rerank = "candidates of each query that the reranker of each run ranks again"
    add("--rerank", type=positive_int, default=0, metavar="N", help=rerank)
    add("--data_dir", help="directory of built datasets, if they were moved")
    add_plugin_flag(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)

    def work() -> None:
        from drl_jax.runtime.plugins import load_plugins
        from drl_jax.runtime.resources import cache_compilations, keep_freed_memory

        load_plugins(options.plugin)
        keep_freed_memory()
        cache_compilations()
        what = {
            name: getattr(options, name) for name in ("checkpoint", "split", "rerank", "data_dir")
        }
        print(compare(options.one, options.other, **what))

    return run_command("drl_jax.compare", work)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = CallableModule
