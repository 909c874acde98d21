"""The directory of a run and its configuration, `config.json`."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from drl_jax.config import Config, ConfigError
from drl_jax.models.drl import config_from_dict
from drl_jax.runtime.distributed import is_main
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_json

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
    except (json.JSONDecodeError, ConfigError) as error:
        raise WorkdirError(f"{path} is not a configuration of this version: {error}") from error


def claim_workdir(workdir: Path, config: Config) -> None:
    """Creates the directory of a run, or checks that it holds a run of this configuration.

    Raises:
      WorkdirError: it holds a run of another configuration, or cannot be written.
    """
    if (workdir / "config.json").exists():
        old, new = _flatten(load_config(workdir)), _flatten(config)
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
        raise WorkdirError(f"cannot write to --workdir={workdir}: {error.strerror}") from error


def _flatten(config: Config) -> dict[str, Any]:
    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(dataclasses.asdict(config), ""))
