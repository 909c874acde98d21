"""The files of a run besides its checkpoints: `config.json`, `metrics.jsonl`, results."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drl_jax.config import Config, ConfigError
from drl_jax.runtime.distributed import is_main
from drl_jax.runtime.errors import UserError

# Fields that may change between the parts of an interrupted run: they change no number.
_FREE_FIELDS = (
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
    """A run directory that is absent, damaged or another run's."""


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or nothing."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def load_config(workdir: Path) -> Config:
    """The configuration of a run.

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
        return Config.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, ConfigError) as error:
        raise WorkdirError(f"{path} is not a configuration of this version: {error}") from error


def claim_workdir(workdir: Path, config: Config) -> None:
    """Makes the directory this run's, or makes sure that it is.

    Raises:
      WorkdirError: it holds a run of another configuration.
    """
    if (workdir / "config.json").exists():
        old, new = _flatten(load_config(workdir)), _flatten(config)
        changed = [name for name in new if old[name] != new[name] and name not in _FREE_FIELDS]
        if changed:
            name = changed[0]
            raise WorkdirError(
                f"{workdir} holds a run of another configuration: config.{name} was {old[name]!r},"
                f" now {new[name]!r} ({len(changed)} such fields); give another --workdir"
            )
    if not is_main():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", dataclasses.asdict(config))
    except OSError as error:
        raise WorkdirError(f"cannot write to --workdir={workdir}: {error.strerror}") from error


def _flatten(config: Config) -> dict[str, Any]:
    def walk(values: Mapping[str, Any], prefix: str):
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(dataclasses.asdict(config), ""))


class JsonlWriter:
    """Appends scalars to `metrics.jsonl`, an object for each write: "step" and the tags' values."""

    def __init__(self, workdir: Path, resumed_step: int):
        """Opens the file; lines past the step that the run resumes from are dropped."""
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            kept = [
                line
                for line in self._path.read_text(encoding="utf-8").splitlines()
                if _step_of(line) <= resumed_step
            ]
            unfinished = self._path.with_name(self._path.name + ".part")
            unfinished.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            unfinished.replace(self._path)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {tag: float(value) for tag, value in scalars.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; a line that a crash cut short counts as past every step."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
