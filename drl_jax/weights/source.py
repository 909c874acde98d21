"""Where weights come from: a path, a name of installed weights, or a repository of the Hub."""

import os
from pathlib import Path

from drl_jax.runtime.files import json_sha256, sha256
from drl_jax.weights import hub, installed
from drl_jax.weights.containers import choose_weights, file_of_weights, files_of


def weights_path(source: str | os.PathLike) -> Path:
    """The path of a file of weights, which is downloaded if it has to be.

    Args:
      source: a path of a file, or of a folder that holds one; or, as a string, one of
        `installed.NAMES` or a repository `hf-hub:ORG/NAME`, also if there is a file or directory of
        that name.

    Raises:
      InstalledWeightsError: the installed file or its record is missing or damaged.
      HubError: see `hub.download`.
      WeightsFileError: a folder has no weights, or several.
    """
    if hub.is_hub_name(source):
        return hub.download(source)
    if source in installed.NAMES:
        return installed.installed_path(source)
    return file_of_weights(Path(source))


def is_weights(source: str | os.PathLike) -> bool:
    """Whether a source names weights, and not a directory of a run."""
    folder = Path(source)
    if hub.is_hub_name(source) or not folder.is_dir():
        return True
    if (folder / "checkpoints").is_dir():
        return False
    return bool(choose_weights(entry.name for entry in folder.iterdir())[0])


def weights_sha256(source: str | os.PathLike) -> str:
    """SHA-256 of a file of weights, or of those of all its parts."""
    files = files_of(weights_path(source))
    hashes = {path.name: sha256(path) for path in files}
    return hashes[files[0].name] if len(files) == 1 else json_sha256(hashes)
