"""Evaluates a checkpoint of a run.

python -m drl_jax.evaluate --workdir=DIR [--checkpoint=best|latest|STEP] [--split=test]
    [--report=DIR]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from drl_jax.runtime.cli import Parser, add_plugin_flag, positive_int, run_command

# None, and the methods of `evaluation/post_processing.py`, which imports more than --help needs.
_POST = ("none", "is", "qbnorm", "nnn", "dsl")


def _parser() -> Parser:
    parser = Parser("python -m drl_jax.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="directory of the run")
    add("--checkpoint", default="best", help="best, latest or a step (%(default)s)")
    add("--split", default="test", help="train, val, test or a stored split (%(default)s)")
    order = "content: sort the frames of videos by their pixels, which hides time from the model"
    add("--frame_order", choices=("time", "content"), default="time", help=order)
    legacy = (
        "print a second table with the tie rule of DRL's original and CLIP4Clip, for comparison"
        " with papers"
    )
    add("--legacy", action="store_true", help=legacy)
    post = f"post-processing of similarities, a table each: {', '.join(_POST)} (none)"
    add("--post", type=_methods, default=["none"], metavar="METHOD[,METHOD...]", help=post)
    size = "captions of train that post-processing takes (5000, or all if there are fewer)"
    add("--bank_size", type=positive_int, metavar="N", help=size)
    report = "write DIR/index.html, one page with the metrics, curves and pictures of the run"
    add("--report", type=Path, metavar="DIR", help=report)
    add("--data_dir", help="directory of built datasets, if they were moved")
    add_plugin_flag(parser)
    return parser


def _methods(text: str) -> list[str]:
    """Argument type: names of `_POST`, separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in _POST:
            raise argparse.ArgumentTypeError(f"there is no {name!r}, but {', '.join(_POST)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)

    def work() -> None:
        from drl_jax.report import prepare_directory, write_report
        from drl_jax.runs.evaluate_run import evaluate
        from drl_jax.runs.workdir import load_config, with_data_dir
        from drl_jax.runtime.plugins import load_plugins
        from drl_jax.runtime.resources import cache_compilations, keep_freed_memory

        load_plugins(options.plugin)
        config = with_data_dir(load_config(options.workdir), options.data_dir)
        if options.report is not None:
            prepare_directory(options.report)
        keep_freed_memory()
        cache_compilations()
        evaluated = evaluate(
            options.workdir,
            config,
            checkpoint=options.checkpoint,
            split_name=options.split,
            frame_order=options.frame_order,
            legacy=options.legacy,
            post=options.post,
            bank_size=options.bank_size,
        )
        if options.report is not None:
            write_report(options.report, options.workdir, evaluated)

    return run_command("drl_jax.evaluate", work)


if __name__ == "__main__":
    sys.exit(main())
