"""Command-line layer of every entry point: parser, configuration flags, errors, exit status.

Exit status: 0 success; 1 an error the user can fix; 2 wrong arguments; 75 a training run that
stopped after a checkpoint, which the same command resumes; 130 interrupted.

Entry points import what they need inside their work function, so that `--help` and a wrong argument
are answered before jax is imported.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from drl_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class Parser(argparse.ArgumentParser):
    """An argument parser, also of subcommands, that prints an error in one line.

    Flags cannot be abbreviated: an abbreviation would change its meaning when a flag is added.
    """

    def __init__(self, prog: str, **options: Any):
        """Creates the parser of a command, e.g. `python -m drl_jax.train`."""
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Prints the error in one line and exits with status 2."""
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message}\n")


def positive_int(text: str) -> int:
    """Argument type: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, not {text!r}")
    return int(text)


def run_command(command: str, work: Callable[[], int | None], *, on_interrupt: str = "") -> int:
    """Runs the work of a command and reports what a user can fix in one line on stderr.

    Args:
      command: name of the command, e.g. `drl_jax.train`.
      work: does the work; may return an exit status.
      on_interrupt: what an interruption with Ctrl-C leaves behind, for the message.

    Returns:
      The exit status.
    """
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS log every file they touch.
    try:
        return work() or 0
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        # A full disk, a missing permission, a directory that was removed meanwhile.
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{command}: {where}{error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        line = (
            f"{command}: interrupted; {on_interrupt}" if on_interrupt else f"{command}: interrupted"
        )
        print(line, file=sys.stderr)
        return 130


# ---------------------------------------------------------------- configuration files


def add_config_flag(parser: Parser) -> None:
    """Adds `--config`; `parse_with_config` reads it and its overrides."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:VARIANT]",
        help="configuration file, e.g. configs/shapes.py; --config.GROUP.FIELD=VALUE overrides a"
        " field (all fields: drl_jax/config.py)",
    )


def parse_with_config(
    parser: Parser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, "ConfigDict"]:
    """Parses arguments and loads the configuration file with typed overrides.

    Args:
      parser: has `--config` (`add_config_flag`).
      arguments: the arguments; None: those of the process.

    Returns:
      The options, and the configuration as a ConfigDict. A wrong file, field, type or argument ends
      the process with one line and status 2.
    """
    options, rest = parser.parse_known_args(arguments)
    from absl import flags
    from ml_collections import config_flags

    config = _find_config(options.config)
    if not Path(config.partition(":")[0]).is_file():
        parser.error(f"no configuration file {config}")
    arguments = [parser.prog, f"--config={config}", *rest]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=True, sys_argv=arguments
    )
    try:
        unparsed = values(arguments)[1:]
        # Without overrides, errors of the file are raised only here.
        values.config.to_dict()
    # A configuration file is code and may raise anything.
    except Exception as error:
        parser.error(_one_line(error))
    if unparsed:
        parser.error(f"unexpected argument {unparsed[0]!r}; flags look like --name=value")
    return options, values.config


def _find_config(config: str) -> str:
    """`configs/NAME.py` is that of the package if there is none below the working directory."""
    path, colon, variant = config.partition(":")
    installed = Path(__file__).parents[1] / path
    if Path(path).parts[:1] != ("configs",) or Path(path).exists() or not installed.exists():
        return config
    return f"{installed}{colon}{variant}"


def default_workdir(config: str) -> Path:
    """`runs/NAME` or `runs/NAME_VARIANT` for `--config=DIR/NAME.py:VARIANT`."""
    path, _, variant = config.partition(":")
    return Path("runs") / "_".join(filter(None, (Path(path).stem, variant)))


def _one_line(error: Exception) -> str:
    """The message of an error, without the traceback that ml_collections puts into it."""
    start, traceback, rest = str(error).partition("Traceback")
    message = start + rest.strip().splitlines()[-1] if traceback else start
    return " ".join(message.split())
