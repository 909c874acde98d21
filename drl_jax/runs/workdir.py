"""The directory of a run: its configuration, `config.json`, and whose its files are."""

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drl_jax.config import Config, ConfigError, UnregisteredError
from drl_jax.models.drl import config_from_dict
from drl_jax.models.tokenizers import stored_name, with_tokenizer
from drl_jax.runs.run_plugins import changed_plugins, how_to_open, keep_plugins
from drl_jax.runtime.distributed import failing_together, from_main, is_main
from drl_jax.runtime.errors import Notice, Unavailable, UserError, as_path, one_line
from drl_jax.runtime.files import copy_once, json_sha256, sha256, unseal, write_json
from drl_jax.runtime.lock import LOCK_FILE, locked

CONFIG_FILE, MANIFEST_FILE, CHECKPOINTS = "config.json", "manifest.json", "checkpoints"
# Parameters of the best checkpoint of a complete run, as an exported file.
BEST_FILE = "best.safetensors"
# With adapters instead: them and the heads, without the base.
ADAPTER_FILE = "adapter.safetensors"
# Of the directory of a run; its manifest and its checkpoints name it. Increase it when an earlier
# run cannot be read any more.
FORMAT = 2
# Fields that may change when a run is resumed: results depend on them by rounding at most, and on
# `skip_nonfinite` only where the run could not continue.
RESUMABLE_FIELDS = (
    "data.cache",
    "data.data_dir",
    "data.num_threads",
    "data.build_if_absent",
    "data.build_flags",
    "train.microbatch",
    "train.log_every",
    "train.pictures",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.skip_nonfinite",
    "eval.batch_size",
    "eval.text_block",
    # What it says is in `model.backbone`, too.
    "model.release",
    "model.remat",
    "model.attention",
    "model.scan_unroll",
    "model.similarity_block",
    # Where its file lies; the content may not change (`_keep_tokenizer`).
    "model.tokenizer",
    "sharding.fsdp",
)


class WorkdirError(UserError):
    """A directory of a run that is missing, damaged or another run's."""


# ---------------------------------------------------------------- reading


def load_config(workdir: Path) -> Config:
    """`stored_config` with the copy of the tokenizer in the directory, which is checked.

    Raises:
      WorkdirError: the directory does not hold a run, or its files are damaged or changed.
    """
    config = stored_config(workdir)
    manifest = own_manifest(workdir)
    for name in changed_plugins(manifest, config):
        text = f"the run in {workdir} was made with another version of {name}; results may differ"
        warnings.warn(text, Notice, stacklevel=2)
    if not config.model.tokenizer:
        return config
    copy = workdir / stored_name(config.model.tokenizer)
    try:
        found = sha256(copy)
    except FileNotFoundError as error:
        raise WorkdirError(
            f"{workdir} lacks {copy.name}, its copy of {config.model.tokenizer}; restore that file"
        ) from error
    except OSError as error:
        raise Unavailable(copy, error) from error
    recorded = (manifest or {}).get("tokenizer_sha256")
    if recorded and recorded != found:
        raise WorkdirError(
            f"{copy} is damaged or another file than the run was trained with (its sha256 was"
            f" {recorded}); restore that file"
        )
    return with_tokenizer(config, str(copy))


def with_data_dir(config: Config, data_dir: str | None) -> Config:
    """The configuration with another directory of built datasets; None: its own."""
    if not data_dir:
        return config
    as_path(data_dir, "data_dir")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=data_dir))


def stored_config(workdir: Path) -> Config:
    """The configuration of a run as it was given; errors of `load_config`."""
    path = workdir / CONFIG_FILE
    try:
        config = config_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise WorkdirError(
            f"no run in {workdir} (it has no {CONFIG_FILE}); train one with: python -m"
            f" drl_jax.train --config=configs/shapes.py --workdir={workdir}"
        ) from error
    except OSError as error:
        raise Unavailable(path, error) from error
    except UnregisteredError as error:
        how = how_to_open(workdir, own_manifest(workdir))
        raise WorkdirError(f"{path}: {error}; {how}") from error
    except (ValueError, ConfigError) as error:
        raise WorkdirError(f"{path} is not a configuration of this version: {error}") from error
    manifest = own_manifest(workdir)
    if manifest and (changed := changed_fields(config_from_dict(manifest["config"]), config)):
        raise WorkdirError(
            f"{path} was changed: config.{changed[0]} is not that of {workdir / MANIFEST_FILE};"
            " undo this"
        )
    return config


def own_manifest(workdir: Path) -> dict[str, Any] | None:
    """The manifest of a run; None if it has none. WorkdirError: damaged, or another version's."""
    path = workdir / MANIFEST_FILE
    try:
        values = read_manifest(path)
    except FileNotFoundError:
        return None
    if values.get("format") != FORMAT:
        raise WorkdirError(
            f"the run in {workdir} is of another version (format {values.get('format', 1)}, this"
            f" one reads {FORMAT}); train it again with: python -m drl_jax.train"
            f" --reproduce={path} --workdir=DIR"
        )
    return values


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a manifest (`runs/manifest.py` writes it), also of an earlier version.

    Raises:
      FileNotFoundError: there is none.
      WorkdirError: it is damaged.
    """
    try:
        values = unseal(path.read_text(encoding="utf-8"))
        if not values["starts"]:
            raise ValueError("it has no starts")
        # One without the plugin of a run is not damaged.
        with contextlib.suppress(UnregisteredError):
            if values.get("format") == FORMAT:
                config_from_dict(values["config"])
        return values
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unavailable(path, error) from error
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise WorkdirError(
            f"{path} is damaged, or not the manifest of a run ({one_line(error)}); move it away: a"
            " run continues without it, and records a new one"
        ) from error


def flatten(config: Config) -> dict[str, Any]:
    """The fields of a configuration by dotted name."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for name, field in value.items():
                yield from walk(f"{prefix}.{name}", field)
        else:
            yield prefix[1:], value

    return dict(walk("", dataclasses.asdict(config)))


def changed_fields(old: Config, new: Config) -> list[str]:
    """Names of the fields that differ and are not in RESUMABLE_FIELDS."""
    before, after = _kept(old), _kept(new)
    return [name for name in after if before[name] != after[name]]


def config_sha256(config: Config) -> str:
    """Hexadecimal SHA-256 of the fields that are not in RESUMABLE_FIELDS."""
    return json_sha256(_kept(config))


def _kept(config: Config) -> dict[str, Any]:
    """The fields that are not in RESUMABLE_FIELDS; of stored features, only whether there are."""
    values = flatten(config)
    # Where they are is no matter: their directory says what they are of.
    values["data.features"] = values["data.features"] and "stored"
    return {name: value for name, value in values.items() if name not in RESUMABLE_FIELDS}


# ---------------------------------------------------------------- whose its files are


class Identity(NamedTuple):
    """Whose a checkpoint, a metric or a file of exported weights is; an empty field is unknown.

    Attributes:
      run: random id, which a run gets with its first checkpoint and keeps when it is resumed or
        moved.
      config: hash of the fields that may not change when a run is resumed.
      dataset: hash of the content of its dataset.
    """

    run: str = ""
    config: str = ""
    dataset: str = ""

    def differences(self, other: "Identity") -> list[str]:
        """What another identity has instead, in words; what one of the two lacks is left out."""
        return [
            f"{name} {theirs[:12]} (here {own[:12]})"
            for name, own, theirs in zip(self._fields, self, other, strict=True)
            if own and theirs and own != theirs
        ]


UNKNOWN = Identity()


def identity_of(workdir: Path) -> Identity:
    """The identity of the run in a directory; without a manifest, id and dataset are unknown.

    Raises:
      WorkdirError: a file of the run is damaged or of another version.
    """
    if (manifest := own_manifest(workdir)) is not None:
        content = manifest["dataset"]["content"]
        return Identity(manifest["id"], manifest["config_sha256"], content)
    if (workdir / CONFIG_FILE).exists():
        return Identity(config=config_sha256(stored_config(workdir)))
    return UNKNOWN


def shared_run_id(known: str) -> str:
    """The id of a run in all processes, which all of them call: a new one if it is not `known`."""
    own = bytes.fromhex(known) or os.urandom(16)
    return from_main(np.frombuffer(own, np.uint8)).tobytes().hex()


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Creates the directory of a run, and keeps other trainings out while the block runs.

    All processes of a run call it; process 0 holds the lock.

    Raises:
      UserError: another training holds the lock, or the directory cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with failing_together(UserError):
            if is_main():
                try:
                    stack.enter_context(locked(workdir / LOCK_FILE, f"the run in {workdir}"))
                except OSError as error:
                    raise Unavailable(workdir, error, "written") from error
        yield


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes `config.json` and copies of the tokenizer and of plugins, or checks those of a run.

    Raises:
      WorkdirError: the directory holds a run of another configuration, or cannot be written.
    """
    old = None
    if (workdir / CONFIG_FILE).exists():
        old = stored_config(workdir)
        if changed := changed_fields(old, config):
            name, before, after = changed[0], flatten(old), flatten(config)
            raise WorkdirError(
                f"{workdir} holds a run of another configuration: config.{name} was"
                f" {before[name]!r}, now {after[name]!r} ({len(changed)} such fields); choose"
                " another directory"
            )
    elif remains := [name for name in (MANIFEST_FILE, CHECKPOINTS) if (workdir / name).exists()]:
        raise WorkdirError(
            f"{workdir} has {remains[0]} but no {CONFIG_FILE}; restore that file, or choose another"
            " directory"
        )
    if not is_main():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Before the configuration: a run with a configuration has its tokenizer and plugins.
        _keep_tokenizer(workdir, config.model.tokenizer, old and old.model.tokenizer)
        keep_plugins(workdir, config)
        write_json(workdir / CONFIG_FILE, dataclasses.asdict(config))
    except OSError as error:
        raise Unavailable(workdir, error, "written") from error


def _keep_tokenizer(workdir: Path, tokenizer: str, old: str | None) -> None:
    """Copies the tokenizer into the directory of a run; `old` is the run's own."""
    name = stored_name(tokenizer) if tokenizer else ""
    if old is not None and name != (stored_name(old) if old else ""):
        raise WorkdirError(
            f"{workdir} holds a run with another tokenizer: config.model.tokenizer was {old!r}, now"
            f" {tokenizer!r}; choose another directory"
        )
    if not tokenizer:
        return
    try:
        copy_once(Path(tokenizer), workdir / name)
    except FileExistsError as error:
        raise WorkdirError(
            f"config.model.tokenizer={tokenizer} is another file than {workdir / name}; choose"
            " another directory"
        ) from error
    except OSError as error:
        raise Unavailable(workdir / name, error, "copied") from error
