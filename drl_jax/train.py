"""Trains DRL on a built dataset; a run in the working directory is resumed.

python -m drl_jax.train --config=configs/shapes.py [--workdir=DIR] [--config.optim.lr=3e-4]
python -m drl_jax.train --config=configs/shapes.py --seeds=0,1,2 [--workdir=DIR]
python -m drl_jax.train --reproduce=RUN/manifest.json [--workdir=DIR]
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drl_jax import CallableModule
from drl_jax.runtime.cli import (
    Parser,
    add_config_flag,
    add_plugin_flag,
    add_ray_flag,
    config_of_file,
    parse_with_config,
    positive_int,
    run_command,
    with_overrides,
)
from drl_jax.runtime.errors import UserError, as_path

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from drl_jax.config import Config
    from drl_jax.runs.evaluate_run import Result


def train(
    config: "str | os.PathLike | ConfigDict | Config",
    workdir: str | os.PathLike | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
) -> "Result":
    """Trains a run, or resumes the one in its directory, and tests its best checkpoint.

    Args:
      config: a file of configuration, FILE:VARIANT, as `--config` takes it; or a configuration.
      workdir: directory of the run. None: runs/NAME_VARIANT, of a file.
      overrides: values of fields, e.g. {"optim.lr": 3e-4}.

    Returns:
      The metrics of the best checkpoint on *test*.

    Raises:
      UserError: the configuration is wrong, or see `runs.train_run.train`.
    """
    from ml_collections import ConfigDict

    from drl_jax.config import Config
    from drl_jax.models.drl import config_from_dict
    from drl_jax.runs import train_run
    from drl_jax.runs.evaluate_run import Result
    from drl_jax.runs.protocol_card import ProtocolCard

    if isinstance(config, str | os.PathLike):
        workdir = workdir or _default_workdir(os.fspath(config))
        config = config_of_file(os.fspath(config))
    if isinstance(config, Config):
        config = ConfigDict(dataclasses.asdict(config))
    if not isinstance(config, ConfigDict):
        what = "a file such as configs/shapes.py, or a configuration"
        raise UserError(f"config is {what}, not {type(config).__name__}")
    if workdir is None:
        raise UserError("give the directory of the run: train(config, workdir)")
    workdir = as_path(workdir, "workdir")
    config = config_from_dict(with_overrides(config, overrides or {}).to_dict())
    found = train_run.train(config, workdir)
    card = ProtocolCard.from_dict(found["card"])
    return Result(workdir, "test", found["test"], found["test_intervals"], card)


def _parser() -> Parser:
    parser = Parser("python -m drl_jax.train", description=__doc__.splitlines()[0])
    add_config_flag(parser, reproduce=True)
    add_plugin_flag(parser)
    workdir = (
        "directory of the run (runs/NAME_VARIANT; runs/reproduced_NAME with --reproduce), or of the"
        " runs with --seeds (runs/NAME_VARIANT_seeds)"
    )
    parser.add_argument("--workdir", type=Path, help=workdir)
    features = (
        "store the features of the frozen towers there, or use those that are: heads are then"
        " trained without the towers (sets config.data.features)"
    )
    parser.add_argument("--features", metavar="DIR", help=features)
    add_ray_flag(parser, "compute the features of --features on")
    seeds = (
        "train a run for each seed, one after another, in WORKDIR/seed_N, and print mean, deviation"
        " and worst of their tests; replaces config.seed"
    )
    parser.add_argument("--seeds", type=_seeds, metavar="0,1,...", help=seeds)
    steps = "trace these steps, e.g. 100:105, into plugins/profile of the run"
    parser.add_argument(
        "--profile_steps", type=_step_range, default=range(0), metavar="FIRST:LAST", help=steps
    )
    group = parser.add_argument_group("several processes")
    distributed = (
        "none: this process alone; auto: found by JAX (SLURM, Open MPI, Kubernetes); manual:"
        " --coordinator, --num_processes and --process_id"
    )
    group.add_argument(
        "--distributed", choices=("none", "auto", "manual"), default="none", help=distributed
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num_processes", type=positive_int, help="number of processes")
    group.add_argument("--process_id", type=int, help="index of this process, from 0")
    devices = "devices of this process (default: all)"
    group.add_argument("--local_device_ids", metavar="0,1,...", help=devices)
    timeout = "seconds to wait for the other processes (%(default)s)"
    group.add_argument("--init_timeout", type=positive_int, default=300, help=timeout)
    return parser


def _seeds(text: str) -> list[int]:
    """Argument type: distinct seeds of 32 bits, separated by commas."""
    values = text.split(",")
    if not all(value.isdecimal() and int(value) < 2**32 for value in values):
        raise argparse.ArgumentTypeError(f"must be a list of seeds such as 0,1,2, not {text!r}")
    seeds = [int(value) for value in values]
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return seeds


def _step_range(text: str) -> range:
    """Argument type: FIRST:LAST, two steps from 1, both included."""
    first, colon, last = text.partition(":")
    if not colon or not (first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be FIRST:LAST, e.g. 100:105, not {text!r}")
    if not 1 <= int(first) <= int(last):
        raise argparse.ArgumentTypeError(f"steps count from 1, and FIRST <= LAST, not {text!r}")
    return range(int(first), int(last) + 1)


def _default_workdir(config: str, suffix: str = "") -> Path:
    """As the help of `--workdir` says, from DIR/NAME.py:VARIANT."""
    path, _, variant = config.partition(":")
    return Path("runs") / "_".join(filter(None, (Path(path).stem, variant, suffix)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""

    def work() -> None:
        # Here, because a configuration is code, and takes a while.
        parser = _parser()
        options, config = parse_with_config(parser, arguments)
        if options.seeds and options.reproduce:
            parser.error("--seeds goes with --config: --reproduce repeats a run with its own seed")
        if options.features:
            config.data.features = options.features
        elif options.ray:
            parser.error("--ray is for --features")
        if options.ray and options.seeds:
            parser.error("--ray goes with one run: store the features first")
        if options.seeds and options.profile_steps:
            parser.error("--profile_steps traces one run; omit --seeds")

        from drl_jax.models.drl import config_from_dict
        from drl_jax.runs import train_run
        from drl_jax.runs.train_seeds import train_seeds
        from drl_jax.runtime.distributed import end_together, initialize
        from drl_jax.runtime.errors import Interrupted
        from drl_jax.runtime.plugins import load_plugins
        from drl_jax.runtime.resources import cache_compilations, keep_freed_memory

        keep_freed_memory()
        cache_compilations()
        initialize(
            options.distributed,
            coordinator=options.coordinator,
            num_processes=options.num_processes,
            process_id=options.process_id,
            local_device_ids=options.local_device_ids,
            timeout=options.init_timeout,
        )
        workdir, steps = options.workdir, options.profile_steps
        if workdir is None and options.reproduce:
            workdir = Path("runs") / f"reproduced_{options.reproduce.absolute().parent.name}"
        elif workdir is None:
            workdir = _default_workdir(options.config, "seeds" if options.seeds else "")
        try:
            load_plugins(options.plugin)
            checked = config_from_dict(config.to_dict())
            if options.seeds:
                train_seeds(checked, workdir, options.seeds)
            else:
                train_run.train(
                    checked,
                    workdir,
                    reproduce=options.reproduce,
                    profile_steps=steps,
                    ray=options.ray or "",
                )
        except Interrupted:
            raise  # In all processes.
        except Exception as error:
            end_together(error)
            raise

    return run_command("drl_jax.train", work)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = CallableModule
