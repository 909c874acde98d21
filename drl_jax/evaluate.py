"""Evaluates a checkpoint of a run.

python -m drl_jax.evaluate --workdir=DIR [--checkpoint=best|latest|STEP] [--split=test]
    [--report=DIR]
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drl_jax import CallableModule
from drl_jax.runtime.cli import Parser, add_plugin_flag, fraction, positive_int, run_command
from drl_jax.runtime.errors import UserError, as_path, check_count

if TYPE_CHECKING:
    from drl_jax.runs.evaluate_run import Result

# None, and the methods of `evaluation/post_processing.py`, which imports more than --help needs.
_POST = ("none", "is", "qbnorm", "nnn", "dsl")
_FRAME_ORDERS = ("time", "content")


def evaluate(
    run: str | os.PathLike,
    *,
    checkpoint: str | int = "best",
    split: str = "test",
    frame_order: str = "time",
    post: str | Sequence[str] = "none",
    bank_size: int | None = None,
    rerank: int = 0,
    report: str | os.PathLike | None = None,
    data_dir: str | None = None,
    show: "Callable[[Result], object]" = lambda result: None,
) -> "Result | dict[str, Result]":
    """Computes the metrics of a checkpoint on a split, and stores them in the run.

    Args:
      run: its directory.
      report: a directory in which to write `index.html`, the report of the run.
      data_dir: directory of built datasets, if they were moved.
      The others are those of `runs.evaluate_run.evaluate`.

    Returns:
      The result; for several methods of post-processing, the results by their names; with
      `rerank`, those of both stages, "none" and "rerank".

    Raises:
      UserError: no such run, checkpoint, dataset, split or method, or a file cannot be written.
    """
    from drl_jax.report import prepare_directory, write_report
    from drl_jax.runs import evaluate_run
    from drl_jax.runs.workdir import load_config, with_data_dir

    workdir = as_path(run, "the run")
    methods = [post] if isinstance(post, str) else post
    if not isinstance(methods, list | tuple) or not methods:
        raise UserError(f"post is a name or a list of names, {', '.join(_POST)}")
    if wrong := [name for name in methods if name not in _POST]:
        raise UserError(f"there is no post-processing {wrong[0]!r}, but {', '.join(_POST)}")
    if frame_order not in _FRAME_ORDERS:
        raise UserError(f"frame_order={frame_order!r}: choose {' or '.join(_FRAME_ORDERS)}")
    if bank_size is not None:
        check_count(bank_size, "bank_size")
    config = with_data_dir(load_config(workdir), data_dir)
    if report is not None:
        prepare_directory(as_path(report, "the report"))
    evaluated = evaluate_run.evaluate(
        workdir,
        config,
        checkpoint=str(checkpoint),
        split_name=split,
        frame_order=frame_order,
        post=methods,
        bank_size=bank_size,
        rerank=rerank,
        show=show,
    )
    if report is not None:
        write_report(Path(report), workdir, evaluated)
    return evaluated.results[post] if isinstance(post, str) and not rerank else evaluated.results


def _parser() -> Parser:
    parser = Parser("python -m drl_jax.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="directory of the run")
    add("--checkpoint", default="best", help="best, latest or a step (%(default)s)")
    add("--split", default="test", help="train, val, test or a stored split (%(default)s)")
    order = "content: sort the frames of videos by their pixels, which hides time from the model"
    add("--frame_order", choices=_FRAME_ORDERS, default="time", help=order)
    legacy = (
        "print a second table with the tie rule of DRL's original and CLIP4Clip, for comparison"
        " with papers"
    )
    add("--legacy", action="store_true", help=legacy)
    post = f"post-processing of similarities, a table each: {', '.join(_POST)} (none)"
    methods = "METHOD[,METHOD...]"
    add("--post", type=lambda text: text.split(","), default=["none"], metavar=methods, help=post)
    size = "captions of train that post-processing takes (5000, or all if there are fewer)"
    add("--bank_size", type=positive_int, metavar="N", help=size)
    text = "candidates of each query that the run's reranker (drl_jax.rerank) ranks again"
    add("--rerank", type=positive_int, default=0, metavar="N", help=text)
    alphas = (
        "numbers from 0 to 1: evaluate (1 - alpha) start + alpha checkpoint, where the start is the"
        " weights that the run began with"
    )
    add("--alphas", type=_alphas, metavar="ALPHA,..", help=alphas)
    second = "with --alphas: another built dataset, to measure forgetting on its test"
    add("--second", default="", metavar="DATASET", help=second)
    report = "write DIR/index.html, one page with the metrics, curves and pictures of the run"
    add("--report", type=Path, metavar="DIR", help=report)
    add("--data_dir", help="directory of built datasets, if they were moved")
    add_plugin_flag(parser)
    return parser


def _alphas(text: str) -> list[float]:
    """Argument type: fractions, separated by commas."""
    return [fraction(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)

    def show(result: "Result") -> None:
        print(result)
        if options.legacy:
            print(result.legacy_table())
        sys.stdout.flush()

    def work() -> None:
        from drl_jax.runs.interpolation import evaluate_alphas
        from drl_jax.runs.workdir import load_config, with_data_dir
        from drl_jax.runtime.plugins import load_plugins
        from drl_jax.runtime.resources import cache_compilations, keep_freed_memory

        load_plugins(options.plugin)
        keep_freed_memory()
        cache_compilations()
        if options.second and not options.alphas:
            raise UserError("--second is that of --alphas; give both")
        others = (options.post, options.frame_order, options.legacy, options.report, options.rerank)
        if options.alphas:
            if others != (["none"], "time", False, None, 0):
                line = "--alphas is of raw similarities, without --rerank and a report"
                raise UserError(f"{line}; leave it out")
            evaluate_alphas(
                options.workdir,
                with_data_dir(load_config(options.workdir), options.data_dir),
                options.alphas,
                second=options.second,
                checkpoint=options.checkpoint,
                split_name=options.split,
            )
            return
        names = ("checkpoint", "split", "frame_order", "post", "bank_size", "rerank", "report")
        what = {name: getattr(options, name) for name in (*names, "data_dir")}
        evaluate(options.workdir, show=show, **what)

    return run_command("drl_jax.evaluate", work)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = CallableModule
