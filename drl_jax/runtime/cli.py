"""Command-line layer of every entry point: parser, configuration flags, errors, exit status.

Exit status: 0 success; 1 an error the user can fix; 2 wrong arguments; 75 a training run that
stopped after a checkpoint, which the same command resumes; 130 interrupted; 141 the reader of its
output is gone.

Entry points import what they need inside their work function, so that `--help` and a wrong argument
are answered before jax is imported.
"""

import argparse
import difflib
import errno
import functools
import json
import logging as std_logging
import math
import os
import runpy
import signal
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from drl_jax.runtime.errors import Notice, UserError
from drl_jax.runtime.signals import Interruption

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class Parser(argparse.ArgumentParser):
    """Errors are one line. Flags cannot be abbreviated: new flags would change abbreviations."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message}\n")


# ---------------------------------------------------------------- types of arguments


def positive_int(text: str) -> int:
    """Argument type: a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, not {text!r}")
    return int(text)


def fraction(text: str) -> float:
    """Argument type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not {text!r}")
    return value


def positive_seconds(text: str) -> float:
    """Argument type: a finite number of seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return seconds


def add_ray_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds `--ray`; `what` the command does there, e.g. "decode on", is for the help."""

    def address(text: str) -> str:
        if not text.strip():  # E.g. of a variable that is not set; not the same as no flag.
            raise argparse.ArgumentTypeError(
                "write local, auto, or HOST:PORT of the head of a Ray cluster"
            )
        return text

    parser.add_argument(
        "--ray",
        type=address,
        metavar="local|auto|HOST:PORT",
        help=f"{what} a Ray cluster (drl_jax[ray]): one on this machine alone, the one that this"
        " machine is a node of, or by the address of its head",
    )


def add_plugin_flag(
    parser: argparse.ArgumentParser, what: str = "an interaction or a head"
) -> None:
    """Adds `--plugin`; `runtime.plugins.load_plugins` executes the files."""
    text = f"a file of yours that registers {what} (docs/tour.md), which is executed; repeatable"
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help=text)


# Flags of commands that describe a file of weights.
FILE_FLAGS = {
    "release": "the release, for a CLIP that does not say its own",
    "weights_key": "prefix of the towers, if it holds several; clip: without the heads of DRL",
    "tokenizer": "its tokenizer, if that is not beside the file",
}


def add_file_flags(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Adds FILE_FLAGS; `of` which file, for the help."""
    for name, what in FILE_FLAGS.items():
        parser.add_argument(f"--{name}", default="", help=of + what)


# ---------------------------------------------------------------- errors and exit status


def run_command(command: str, work: Callable[[], int | None], *, on_interrupt: str = "") -> int:
    """Runs the work of a command and returns its exit status.

    What a user can fix, and notices, become lines on stderr that start with `command`, e.g.
    `drl_jax.train`. `on_interrupt` says what Ctrl-C leaves behind; the message of a
    KeyboardInterrupt stands instead, if it has one.
    """
    interrupted = "; ".join(filter(None, (f"{command}: interrupted", on_interrupt)))
    interruption = Interruption(interrupted)
    sys.unraisablehook = functools.partial(_report_unraisable, interruption)
    try:
        with interruption:
            from absl import logging

            # Orbax and TFDS log every file they touch, and tracebacks of errors they raise, too.
            logging.set_verbosity(logging.FATAL)
            # Tasks that Orbax leaves behind, and that fail by themselves.
            abandoned = "Task exception was never retrieved"
            std_logging.getLogger("asyncio").addFilter(
                lambda record: not record.getMessage().startswith(abandoned)
            )
            warnings.simplefilter("always", Notice)
            warnings.showwarning = functools.partial(_show_warning, command, warnings.showwarning)
            return _status_of(command, work)
    except KeyboardInterrupt as error:
        print(f"{command}: interrupted; {error}" if str(error) else interrupted, file=sys.stderr)
    except Exception:
        # Libraries turn an interruption into errors of their own.
        if not interruption.came:
            raise
        print(interrupted, file=sys.stderr)
    return interruption.end()


def _status_of(command: str, work: Callable[[], int | None]) -> int:
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has what it wants. Nothing can be written there at
        # exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        # A full disk, a missing permission, a directory that was removed meanwhile.
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        name = errno.errorcode.get(error.errno, str(error.errno))
        print(f"{command}: {where}{error.strerror} ({name})", file=sys.stderr)
        return 1


def _show_warning(
    command: str, show: Callable, message: Warning, category: type[Warning], *where: Any
) -> None:
    if issubclass(category, Notice):
        print(f"{command}: {message}", file=sys.stderr)
    else:
        show(message, category, *where)


def _report_unraisable(interruption: Interruption, unraisable: Any) -> None:
    """Prints an exception that cannot be raised; an interruption is raised again elsewhere.

    Tasks that Orbax leaves behind, when it cannot read or write an array, would print pages.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        interruption.raise_again()
        return
    is_task = isinstance(unraisable.object, types.CoroutineType)
    if not is_task and "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


# ---------------------------------------------------------------- configuration files


def add_config_flag(parser: Parser, *, reproduce: bool = False) -> None:
    """Adds `--config`, and `--reproduce` if wanted; `parse_with_config` reads them."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--config",
        metavar="FILE[:VARIANT]",
        help="configuration file, e.g. configs/shapes.py; --config.GROUP.FIELD=VALUE overrides a"
        " field (all fields: drl_jax/config.py)",
    )
    if reproduce:
        group.add_argument(
            "--reproduce",
            type=Path,
            metavar="RUN/manifest.json",
            help="start the run of this manifest again; --config.data.data_dir=DIR if its dataset"
            " is elsewhere",
        )


def parse_with_config(
    parser: Parser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, "ConfigDict"]:
    """Parses arguments, and loads the configuration (`add_config_flag`) with its overrides.

    A wrong file, field, type or argument ends the process with one line and status 2.
    """
    options, overrides = parser.parse_known_args(arguments)
    if getattr(options, "reproduce", None) is not None:
        config = _config_of_manifest(parser, options.reproduce)
    else:
        try:
            config = config_of_file(options.config)
        except UserError as error:
            parser.error(str(error))
    from absl import flags
    from ml_collections import config_flags

    values, words = flags.FlagValues(), ["", *overrides]
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, lock_config=True, sys_argv=words
        )
        unparsed = values(words)[1:]
    except Exception as error:
        parser.error(_unknown_field(config.to_dict(), overrides) or " ".join(str(error).split()))
    if unparsed:
        parser.error(f"unexpected argument {unparsed[0]!r}; flags look like --name=value")
    return options, values.config


def config_of_file(name: str) -> "ConfigDict":
    """The configuration of FILE:VARIANT; a file of the package if the working one is absent.

    Raises a UserError if there is no such file, or its code raises an error.
    """
    path, _, variant = name.partition(":")
    installed = Path(__file__).parents[1] / path
    if Path(path).parts[:1] == ("configs",) and not Path(path).exists() and installed.exists():
        path = str(installed)
    if not Path(path).is_file():
        raise UserError(f"no configuration file {name}")
    # It is code and may raise anything.
    try:
        config = runpy.run_path(path)["get_config"](*filter(None, [variant]))
        config.to_dict()
        return config
    except Exception as error:
        message = " ".join(str(error).split())
        raise UserError(f"{name}: {type(error).__name__}: {message}") from error


def with_overrides(config: "ConfigDict", fields: Mapping[str, Any]) -> "ConfigDict":
    """A configuration with other values of fields such as "optim.lr"; or UserError."""
    if not isinstance(fields, Mapping):
        raise UserError(f'overrides are a dict such as {{"optim.lr": 3e-4}}, not {fields!r}')
    changed = config.copy_and_resolve_references()
    try:
        changed.update_from_flattened_dict(dict(fields))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        line = _unknown_field(config.to_dict(), [f"config.{name}" for name in fields])
        raise UserError(line or " ".join(str(error).split())) from error
    return changed


def _config_of_manifest(parser: Parser, path: Path) -> "ConfigDict":
    from ml_collections import ConfigDict

    try:
        return ConfigDict(dict(json.loads(path.read_text(encoding="utf-8"))["config"]))
    except OSError as error:
        parser.error(f"{path} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError) as error:
        parser.error(f"{path} is not the manifest of a run ({type(error).__name__}: {error})")


def _unknown_field(config: dict[str, Any], overrides: Sequence[str]) -> str:
    """The message for the first override of a field that does not exist; empty if all exist."""
    for override in overrides:
        name = override.lstrip("-").partition("=")[0]
        group, where = config, "config"
        for part in name.removeprefix("config.").split(".") if name.startswith("config.") else []:
            if not isinstance(group, dict):
                return f"--{name}: {where} is a value, not a group of fields"
            if part not in group:
                close = difflib.get_close_matches(part, group, n=1)
                likely = f" (did you mean {close[0]}?)" if close else ""
                return f"{where} has no field {part!r}{likely}; it has {', '.join(group)}"
            group, where = group[part], f"{where}.{part}"
    return ""
