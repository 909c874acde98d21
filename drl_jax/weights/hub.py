"""Weights of a repository on the Hugging Face Hub: `hf-hub:ORG/NAME` or `hf-hub:ORG/NAME@REVISION`.

The package `huggingface_hub` downloads, and keeps its cache. It is imported at the first download.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from drl_jax.runtime.errors import UserError, one_line
from drl_jax.weights import beside
from drl_jax.weights.containers import PREFERRED, SUFFIXES, choose_weights, files_of
from drl_jax.weights.tensors import some

PREFIX = "hf-hub:"
# Files that say what the weights are; those that exist are downloaded with them.
DESCRIPTIONS = (*beside.DESCRIPTIONS, "tokenizer.json", "spiece.model")
_NAME = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]*/\w[\w.-]*", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
# What `download` has returned in this process: a run reads its weights and hashes the same file.
_downloaded: dict[str, Path] = {}


class HubError(UserError):
    """A repository of the Hub cannot be used; the message says what to do."""


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether a source of weights is a repository: a string with the prefix, never a `Path`."""
    return isinstance(source, str) and source.startswith(PREFIX)


def download(source: str) -> Path:
    """Downloads the weights of a repository, and their descriptions, unless they are in the cache.

    Without a connection, files of an earlier download are used. A second call in a process returns
    the same path, also if the branch has moved.

    Args:
      source: `hf-hub:ORG/NAME`, of the branch `main`; or with `@REVISION`, a branch, tag or commit.

    Returns:
      The path of the weights in a snapshot folder of the cache; the DESCRIPTIONS of the repository
      lie beside it. It is a link to a file with another name: do not resolve it.

    Raises:
      HubError: the name is malformed, `huggingface_hub` is not installed, there is no such
        repository or revision or no access to it, it has no single file of weights, or it can
        neither be downloaded nor found in the cache.
      KeyboardInterrupt: with a message that says what to do.
    """
    repository, revision = _parse(source)
    if source in _downloaded and _downloaded[source].exists():
        return _downloaded[source]
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise HubError(
            f"{source} needs the package huggingface_hub: pip install 'drl_jax[hub]'"
        ) from error
    try:
        names = _remote_names(repository, revision)
        if names is None:
            path = _cached(source, repository, revision)
        else:
            path = _download(repository, revision, names, _chosen(names, source))
    except UserError:
        raise
    # Errors of the HTTP client, whose package differs between versions, and of a native extension.
    except Exception as error:
        raise HubError(_explanation(source, repository, revision, error)) from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"complete files of {source} stay in {constants.HF_HUB_CACHE}; run the command again"
        ) from error
    _downloaded[source] = path
    return path


def resolved_revision(path: Path) -> str | None:
    """The commit of a path that `download` returned; None for a path outside a snapshot folder."""
    folder = path.parent
    in_cache = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if in_cache else None


def _chosen(names: Iterable[str], source: str) -> str:
    """The file of weights among the files of a repository; HubError if none can be told."""
    name, problem = choose_weights(names)
    if problem:
        raise HubError(
            f"{source} {problem}; supported are {', '.join(PREFERRED)} or a single file *"
            f"{' or *'.join(SUFFIXES)}; download the right one with `hf download` and give its path"
        )
    return name


def _parse(source: str) -> tuple[str, str]:
    """Repository and revision of a name."""
    repository, at, revision = source.removeprefix(PREFIX).partition("@")
    revision = revision if at else "main"
    if not _NAME.fullmatch(repository) or not _REVISION.fullmatch(revision):
        raise HubError(f"{source!r} is not {PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION")
    return repository, revision


def _remote_names(repository: str, revision: str) -> list[str] | None:
    """Files of a repository, or None if the Hub does not answer and the cache has weights."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    # The default is to wait forever.
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=timeout)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:
        # No connection, offline mode, a proxy or a server that fails.
        endings = (*SUFFIXES, ".bin", ".index.json")
        if not any(name.endswith(endings) for name in _cached_names(repository, revision)):
            raise
        return None
    return [sibling.rfilename for sibling in info.siblings or ()]


def _download(repository: str, revision: str, names: list[str], weights: str) -> Path:
    """Downloads the descriptions and the weights, last: where they are, the others are too."""
    from huggingface_hub import hf_hub_download

    for name in (*(name for name in DESCRIPTIONS if name in names), weights):
        path = Path(hf_hub_download(repository, name, revision=revision))
        # The others are of the same commit, even if the branch moves now.
        revision = path.parent.name
    for part in files_of(path)[1:]:
        hf_hub_download(repository, part.name, revision=revision)
    return path


def _cached(source: str, repository: str, revision: str) -> Path:
    name = _chosen(_cached_names(repository, revision), source)
    path = _snapshot(repository, revision) / name
    if absent := [part.name for part in files_of(path) if not part.exists()]:
        raise HubError(f"{source} is not complete in the cache: {some(absent)} is missing")
    return path


def _cached_names(repository: str, revision: str) -> list[str]:
    """Files of a revision that are in the cache."""
    folder = _snapshot(repository, revision)
    return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _snapshot(repository: str, revision: str) -> Path:
    """Folder of a revision in the cache, whose layout is documented; it may not exist."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    reference = root / "refs" / revision
    if reference.is_file():
        revision = reference.read_text(encoding="utf-8").strip()
    return root / "snapshots" / revision


def _explanation(source: str, repository: str, revision: str, error: Exception) -> str:
    """One line for an error of `huggingface_hub`."""
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    log_in = "log in with `hf auth login` or HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{source} is gated: accept its terms on {hub}/{repository}, and {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{hub} has no repository {repository}, or it is private: check the name, or {log_in}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{repository} on {hub} has no revision {revision}: give a branch, tag or commit hash"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{source} is not in the cache {cache}, and HF_HUB_OFFLINE forbids its download"
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or cache
        return f"{source} cannot be stored: {where}: {error.strerror}; HF_HOME moves the cache"
    return (
        f"{source} is not in the cache {cache}, and its download from {hub} failed"
        f" ({one_line(error)}); check the connection and try again, or download it on another"
        " machine and copy the cache"
    )
