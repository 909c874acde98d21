"""What the entry points share: flags, and errors as one line."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from drl_jax.runtime.errors import UserError


def define_config_flag() -> flags.FlagHolder:
    """`--config=configs/NAME.py[:VARIANT]` with typed overrides `--config.group.field=value`."""
    holder = config_flags.DEFINE_config_file(
        "config", None, "Configuration file, e.g. configs/shapes.py.", lock_config=True
    )
    flags.mark_flag_as_required("config")
    return holder


def default_workdir() -> str:
    """`runs/NAME` or `runs/NAME_VARIANT` of the configuration that was given."""
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    path, _, variant = name.partition(":")
    return str(Path("runs") / "_".join(filter(None, (Path(path).stem, variant))))


def run(main: Callable[[], None]) -> None:
    """Parses the flags, runs `main`, and exits; a user's mistake is one line and status 1."""
    app.run(lambda _: _report_errors(main), flags_parser=_parse_flags)


def run_with_paths(main: Callable[..., None], *names: str) -> None:
    """As `run`, for a command that takes paths before its flags: `main(path, ...)`.

    Args:
      main: called with one Path for each name.
      names: what the paths are called in the message about a wrong number of them.
    """

    def parse(arguments: Sequence[str]) -> list[str]:
        rest = _parse_flags(arguments, positional=len(names))
        if len(rest) != 1 + len(names):
            _fail(f"needs {len(names)} paths: {' '.join(names)}", status=2)
        return rest

    app.run(
        lambda rest: _report_errors(lambda: main(*map(Path, rest[1:]))),
        flags_parser=parse,
    )


def _parse_flags(arguments: Sequence[str], positional: int = 0) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
    # A config file is code: what it raises, and what ml_collections raises about a field that it
    # does not have, is about the flags.
    except Exception as error:
        _fail(_in_one_line(error), status=2)
    if len(rest) > 1 + positional:
        _fail(f"unexpected argument {rest[1 + positional]!r}; flags look like --name=value", 2)
    return rest


def _in_one_line(error: Exception) -> str:
    """The message without the traceback that ml_collections puts into it."""
    start, traceback, rest = str(error).partition("Traceback")
    message = start + rest.strip().splitlines()[-1] if traceback else start
    return " ".join(message.split())


def _report_errors(main: Callable[[], None]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # Orbax tells of every file that it touches
    cache_compilations()
    try:
        main()
    except UserError as error:
        _fail(str(error), status=1)
    except KeyboardInterrupt:
        _fail("interrupted", status=130)


def cache_compilations() -> None:
    """Keeps what XLA compiles in the user's cache directory, for the next run of any command.

    JAX_COMPILATION_CACHE_DIR, JAX's own setting, names another directory, or none if it is empty.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(home) / "drl_jax" / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # no place to keep anything, as in some containers: only slower
    jax.config.update("jax_compilation_cache_dir", str(directory))


def _fail(message: str, status: int) -> None:
    print(f"{Path(sys.argv[0]).stem}: {message}", file=sys.stderr)
    sys.exit(status)
