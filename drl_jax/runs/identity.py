"""Whose a checkpoint is.

A run has a random id, which it gets with its first checkpoint and keeps when it is resumed or
moved. The id and hashes of the run's configuration and dataset are in its `manifest.json`, its
checkpoints and their metrics, and in exported weights.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from drl_jax.runs.workdir import (
    CONFIG_FILE,
    config_sha256,
    own_manifest,
    stored_config,
)
from drl_jax.runtime.distributed import from_main

_ID_BYTES = 16
# Digits of an id or a hash in a message.
_SHORT = 12


class Identity(NamedTuple):
    """Whose something is; an empty field is unknown.

    Attributes:
      run: id of the run.
      config: hash of the fields that may not change when a run is resumed.
      dataset: hash of the content of its dataset.
    """

    run: str = ""
    config: str = ""
    dataset: str = ""

    def differences(self, other: "Identity") -> list[str]:
        """What another identity has instead, in words; what one of the two lacks is left out."""
        return [
            f"{name} {theirs[:_SHORT]} (here {own[:_SHORT]})"
            for name, own, theirs in zip(self._fields, self, other, strict=True)
            if own and theirs and own != theirs
        ]


UNKNOWN = Identity()


def identity_of(workdir: Path) -> Identity:
    """The identity of the run in a directory, from its manifest.

    Without a manifest, the id and the dataset are unknown.

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
    own = bytes.fromhex(known) or os.urandom(_ID_BYTES)
    return from_main(np.frombuffer(own, np.uint8)).tobytes().hex()
