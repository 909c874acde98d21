"""The directory of a run and its configuration, `config.json`."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from drl_jax.config import Config, ConfigError
from drl_jax.models.drl import config_from_dict
from drl_jax.runtime.distributed import failing_together, is_main
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_json
from drl_jax.runtime.lock import LOCK_FILE, locked

# Fields that may change when a run is resumed: results do not depend on them.
RESUMABLE_FIELDS = (
    "data.cache",
    "data.data_dir",
    "data.num_threads",
    "data.build_if_absent",
    "data.build_flags",
    "train.microbatch",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.skip_nonfinite",
    "eval.batch_size",
    "eval.text_block",
    "model.remat",
    "model.scan_unroll",
    "model.similarity_block",
    "sharding.fsdp",
)


class WorkdirError(UserError):
    """A directory of a run that is missing, damaged or another run's."""


def load_config(workdir: Path) -> Config:
    """Reads the configuration of a run.

    Raises:
      WorkdirError: the directory does not hold a run.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise WorkdirError(
            f"no run in {workdir} (it has no config.json); train one with: python -m drl_jax.train"
            f" --config=configs/shapes.py --workdir={workdir}"
        )
    try:
        return config_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise WorkdirError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, ConfigError) as error:
        raise WorkdirError(f"{path} is not a configuration of this version: {error}") from error


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Keeps other trainings out of the directory of a run while the block runs.

    All processes of a run call it; process 0 holds the lock. Creates the directory.

    Raises:
      UserError: another training holds the lock, or the directory cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with failing_together(UserError):
            if is_main():
                try:
                    stack.enter_context(locked(workdir / LOCK_FILE, f"the run in {workdir}"))
                except OSError as error:
                    raise _unwritable(workdir, error) from error
        yield


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes `config.json`, or checks that the directory holds a run of this configuration.

    Raises:
      WorkdirError: it holds a run of another configuration, or cannot be written.
    """
    if (workdir / "config.json").exists():
        old, new = flatten(load_config(workdir)), flatten(config)
        changed = [name for name in new if old[name] != new[name] and name not in RESUMABLE_FIELDS]
        if changed:
            name = changed[0]
            raise WorkdirError(
                f"{workdir} holds a run of another configuration: config.{name} was {old[name]!r},"
                f" now {new[name]!r} ({len(changed)} such fields); choose another --workdir"
            )
    if not is_main():
        return
    try:
        write_json(workdir / "config.json", dataclasses.asdict(config))
    except OSError as error:
        raise _unwritable(workdir, error) from error


def _unwritable(workdir: Path, error: OSError) -> WorkdirError:
    return WorkdirError(f"cannot write to --workdir={workdir}: {error.strerror}")


def flatten(config: Config) -> dict[str, Any]:
    """The fields of a configuration by dotted name."""

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(dataclasses.asdict(config), ""))
