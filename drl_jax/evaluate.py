"""Evaluates a checkpoint of a run.

python -m drl_jax.evaluate --workdir=DIR [--checkpoint=best|latest|STEP] [--split=test]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from drl_jax.runtime.cli import Parser, run_command


def _parser() -> Parser:
    parser = Parser("python -m drl_jax.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="directory of the run")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step (%(default)s)")
    parser.add_argument(
        "--split", default="test", help="train, val, test or a stored split (%(default)s)"
    )
    parser.add_argument(
        "--frame_order",
        choices=("time", "content"),
        default="time",
        help="content: sort the frames of each video by their pixels, which hides the order of"
        " time from the model",
    )
    parser.add_argument(
        "--legacy",
        action="store_true",
        help="print a second table with the tie rule of DRL's original and CLIP4Clip, for"
        " comparison with papers",
    )
    parser.add_argument("--data_dir", help="directory of built datasets, if they were moved")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = _parser().parse_args(arguments)

    def work() -> None:
        from drl_jax.runs.evaluate_run import evaluate
        from drl_jax.runs.workdir import load_config, with_data_dir
        from drl_jax.runtime.allocator import keep_freed_memory
        from drl_jax.runtime.compilation_cache import cache_compilations

        keep_freed_memory()
        cache_compilations()
        evaluate(
            options.workdir,
            with_data_dir(load_config(options.workdir), options.data_dir),
            checkpoint=options.checkpoint,
            split_name=options.split,
            frame_order=options.frame_order,
            legacy=options.legacy,
        )

    return run_command("drl_jax.evaluate", work)


if __name__ == "__main__":
    sys.exit(main())
