"""`manifest.json` of a run: what it was made from, and each time that it was started.

A run belongs to the content of its dataset: a dataset that was built again from other files has
another order of examples and another number of steps.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from drl_jax.config import Config
from drl_jax.data.records import VideoDataset
from drl_jax.models.drl import config_from_dict
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.runs.run_plugins import changed_plugins, describe_plugins
from drl_jax.runs.workdir import (
    FORMAT,
    MANIFEST_FILE,
    Identity,
    WorkdirError,
    changed_fields,
    claim_workdir,
    config_sha256,
    flatten,
    own_manifest,
)
from drl_jax.runtime.distributed import failing_together, is_main
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import seal, write_json
from drl_jax.weights import source

_PACKAGES = (
    *("drl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("grain", "tensorflow-datasets", "array_record", "av", "pillow"),
)


class RunRecord:
    """The manifest of a run that is being trained; only process 0 writes it.

    Attributes:
      identity: of the run; one that has no manifest does not know its id yet.
      step: the step of the last checkpoint since this start.
    """

    def __init__(
        self, workdir: Path, config: Config, dataset: VideoDataset, seconds: Mapping[str, float]
    ):
        """Reads the manifest of a run, or makes that of a new one; errors of `recorded`."""
        self._path = workdir / MANIFEST_FILE
        self._weights_sha256 = weights_sha256(config)
        self._values: dict[str, Any] = {
            "format": FORMAT,
            "id": "",
            "starts": [],
            "weights_sha256": self._weights_sha256,
            "plugins": describe_plugins(config),
            "config_sha256": config_sha256(config),
        }
        if (found := own_manifest(workdir)) is not None:
            self._values = found
            _check_inputs(found, config, dataset, f"the run in {workdir}")
        self._values |= {
            "config": dataclasses.asdict(config),
            "dataset": {"name": config.data.dataset, "content": dataset.content},
            "tokenizer_sha256": _tokenizer_sha256(config),
        }
        self.identity = Identity(self._values["id"], self._values["config_sha256"], dataset.content)
        self.step, self._started, self._seconds = 0, False, seconds

    def check_weights(self, config: Config) -> None:
        """Raises WorkdirError unless the initial weights are those that the run started with."""
        if self._values["weights_sha256"] != self._weights_sha256:
            raise WorkdirError(
                f"config.model.init={config.model.init} is another file than the run in"
                f" {self._path.parent} was started with; choose another directory"
            )

    def start(self, run: str, step: int, total_steps: int) -> None:
        """Adds this start, from `step`; `run` is the run's id."""
        self.step, self._started = step, True
        self._values |= {"id": run, "total_steps": total_steps}
        start = {"started": _now(), "ended": None, "outcome": None}
        start |= {"first_step": step, "last_step": None, "seconds": None}
        self._values["starts"].append({**start, "command": sys.orig_argv, **environment()})
        self._write()

    def end(self, outcome: str) -> None:
        """Completes the row of this start, if there is one; that of a killed run stays open."""
        if self._started:
            seconds = {name: round(s, 2) for name, s in self._seconds.items()}
            end = {"ended": _now(), "outcome": outcome, "last_step": self.step, "seconds": seconds}
            self._values["starts"][-1] |= end
            self._write()

    def _write(self) -> None:
        if is_main():
            write_json(self._path, seal(self._values))


@contextlib.contextmanager
def recorded(
    workdir: Path, config: Config, dataset: VideoDataset, seconds: Mapping[str, float]
) -> Iterator[RunRecord]:
    """Claims the directory of a run and records how the block ends.

    `seconds` has, at the end, the time that was spent on each activity.

    Raises:
      WorkdirError: the directory holds another run, or one of another dataset or tokenizer.
    """
    with failing_together(UserError):
        record = RunRecord(workdir, config, dataset, seconds)
        claim_workdir(workdir, config)
    try:
        yield record
    except BaseException as error:
        # A full disk must not hide the error.
        with contextlib.suppress(OSError):
            record.end(f"{type(error).__name__}: {error}")
        raise
    record.end("finished")


def environment() -> dict[str, Any]:
    """Versions, commit, host and devices of this process."""
    commit, clean = _commit()
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit,
        "clean": clean,
        "host": socket.gethostname(),
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }


def differences(manifest: Mapping[str, Any], config: Config, dataset: VideoDataset) -> list[str]:
    """What differs from the run of a manifest and may change results a little, in words.

    Raises:
      WorkdirError: other fields, weights, tokenizer or dataset, which make another run.
    """
    original = config_from_dict(manifest["config"])
    there, here = flatten(original), flatten(config)
    changed = [name for name in here if here[name] != there[name]]
    if other := [name for name in changed_fields(original, config) if name != "model.init"]:
        name = other[0]
        raise WorkdirError(
            f"--reproduce starts the same run, but config.{name} is {there[name]!r} in the manifest"
            f" and {here[name]!r} here"
        )
    if manifest["weights_sha256"] != weights_sha256(config):
        raise WorkdirError(
            f"config.model.init={config.model.init} is not the file that the run started from (its"
            f" sha256 is {manifest['weights_sha256']})"
        )
    _check_inputs(manifest, config, dataset, "the run of the manifest")
    found = [f"config.{name}: {there[name]!r} there, {here[name]!r} here" for name in changed]
    own, starts = environment(), manifest["starts"]
    for name, version in own["versions"].items():
        versions = {start["versions"].get(name, "none") for start in starts}
        if versions != {version}:
            found.append(f"{name}: {', '.join(sorted(versions))} there, {version} here")
    for name in ("commit", "devices"):
        if starts[0][name] != own[name]:
            found.append(f"{name}: {starts[0][name]} there, {own[name]} here")
    if any(start["clean"] is False for start in starts):
        found.append("the run was made from files with uncommitted changes")
    if own["clean"] is False:
        found.append("the files here have uncommitted changes")
    return found


def _check_inputs(
    manifest: Mapping[str, Any], config: Config, dataset: VideoDataset, run: str
) -> None:
    expected = manifest["dataset"]["content"]
    if expected != dataset.content:
        raise WorkdirError(
            f"the dataset in {dataset.directory} is not the one that {run} started with (content"
            f" {dataset.content[:12]}, was {expected[:12]}); build it again from the same files, or"
            " start a new run in another directory"
        )
    if changed := changed_plugins(manifest, config):
        raise WorkdirError(
            f"{changed[0]} is another version than {run} started with; give the copy in the run's"
            " folder plugins, or start a new run in another directory"
        )
    if manifest.get("tokenizer_sha256", "") != _tokenizer_sha256(config):
        raise WorkdirError(
            f"config.model.tokenizer={config.model.tokenizer} is not the tokenizer that {run}"
            " started with; choose another directory, or give the same file"
        )


def _tokenizer_sha256(config: Config) -> str:
    return load_tokenizer(config.model).sha256 if config.model.tokenizer else ""


def weights_sha256(config: Config) -> str:
    return source.weights_sha256(config.model.init) if config.model.init else ""


def _commit() -> tuple[str | None, bool | None]:
    """Commit of this package's repository, and whether its files are those of the commit."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        options = {"capture_output": True, "text": True, "check": True, "timeout": 10}
        return subprocess.run(command, **options).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # Not that of a parent directory.
        return git("rev-parse", "HEAD"), not git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None, None  # Installed without git, or without a repository.


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
