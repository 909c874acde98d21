"""Where weights come from: a path, a name of installed weights, or a repository of the Hub."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path

from drl_jax.hub import installed, repository
from drl_jax.runtime.files import json_sha256, sha256
from drl_jax.weights.errors import about
from drl_jax.weights.folders import (
    BESIDE,
    PREFERRED,
    SUFFIXES,
    choose_weights,
    file_of_weights,
    files_of,
)

# Flags of commands that describe a file of weights.
FILE_FLAGS = {
    "release": "the release, for a CLIP that does not say its own",
    "weights_key": "prefix of the towers, if it holds several; clip: without the heads of DRL",
    "tokenizer": "its tokenizer, if that is not beside the file",
}


def weights_path(source: str | os.PathLike) -> Path:
    """The path of a file of weights, which is downloaded if it has to be.

    Args:
      source: a path of a file, or of a folder that holds one; or, as a string, one of
        `installed.NAMES` or a repository `hf-hub:ORG/NAME`, also if there is a file or directory
        of that name.

    Raises:
      HubError: see `repository.download`.
      InstallationError: an installed file is missing or damaged.
      WeightsFileError: a folder has no weights, or several.
      Unavailable: a folder or an installed file cannot be read.
    """
    if repository.is_hub_name(source):
        choose = functools.partial(_wanted, source)
        return repository.download(source, choose, lambda path: files_of(path)[1:])
    if source in installed.NAMES:
        return installed.path_of(source)
    return file_of_weights(Path(source))


def _wanted(source: str, names: Iterable[str]) -> list[str]:
    """Of the files of a repository, the weights and before them those that belong beside them."""
    names = list(names)
    name, problem = choose_weights(names)
    if problem:
        raise repository.HubError(
            f"{source} {problem}; supported are {', '.join(PREFERRED)} or a single file *"
            f"{' or *'.join(SUFFIXES)}; download the right one with `hf download` and give its path"
        )
    return [*(other for other in BESIDE if other in names), name]


def is_weights(source: str | os.PathLike) -> bool:
    """Whether a source names weights, and not a directory of a run."""
    folder = Path(source)
    if repository.is_hub_name(source) or not folder.is_dir():
        return True
    if (folder / "checkpoints").is_dir():
        return False
    with about(folder):
        return bool(choose_weights(entry.name for entry in folder.iterdir())[0])


def weights_sha256(source: str | os.PathLike) -> str:
    """SHA-256 of a file of weights, or of those of all its parts."""
    path = weights_path(source)
    hashes = {file.name: sha256(file) for file in files_of(path)}
    return json_sha256(hashes) if len(hashes) > 1 else hashes[path.name]
