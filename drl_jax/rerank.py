"""Trains a reranker of a run, on stored features of its towers.

python -m drl_jax.rerank --workdir=RUN [--features=DIR] [--candidates=20] [--epochs=60]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from drl_jax.runtime.cli import Parser, add_plugin_flag, positive_int, run_command


def _parser() -> Parser:
    parser = Parser("python -m drl_jax.rerank", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="directory of the run")
    text = "store the features of the towers there, or use those that are (those of the run)"
    add("--features", default="", metavar="DIR", help=text)
    text = "of each query on val that are reranked, to choose the epoch (%(default)s)"
    add("--candidates", type=positive_int, default=20, help=text)
    add("--epochs", type=positive_int, default=60, help="%(default)s")
    add("--seed", type=int, default=0, help="%(default)s")
    add("--data_dir", help="directory of built datasets, if they were moved")
    add_plugin_flag(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed={options.seed} must be from 0 to {2**32 - 1}")

    def work() -> None:
        from drl_jax.runs.rerank_training import RerankSettings, train_reranker
        from drl_jax.runs.workdir import load_config, with_data_dir
        from drl_jax.runtime.plugins import load_plugins
        from drl_jax.runtime.resources import cache_compilations, keep_freed_memory

        load_plugins(options.plugin)
        keep_freed_memory()
        cache_compilations()
        config = with_data_dir(load_config(options.workdir), options.data_dir)
        settings = RerankSettings(options.candidates, options.epochs, options.seed)
        found = train_reranker(options.workdir, config, settings, features=options.features)
        history = found["val_t2v_R1"]
        print(
            f"reranker of epoch {found['epoch']}: val t2v R@1 {max(history):.1f}, first stage"
            f" {history[0]:.1f}; test it with python -m drl_jax.evaluate"
            f" --workdir={options.workdir} --rerank={settings.candidates}"
        )

    return run_command("drl_jax.rerank", work, on_interrupt="rerun the command to continue")


if __name__ == "__main__":
    sys.exit(main())
