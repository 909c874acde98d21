"""A repository on the Hugging Face Hub: `hf-hub:ORG/NAME` or `hf-hub:ORG/NAME@REVISION`.

The package `huggingface_hub` downloads, and keeps its cache. It is imported at the first download.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from drl_jax.runtime.errors import UserError, one_line

PREFIX = "hf-hub:"
_NAME = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]*/\w[\w.-]*", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
# Of a source and the names of its files, those that are wanted; the path of the last one is
# returned. It raises HubError if they are not there.
Choose = Callable[[str, Iterable[str]], list[str]]
# Of that path, others that belong to it.
Parts = Callable[[Path], list[Path]]
# What `download` has returned in this process: a run reads its weights and hashes the same file.
_downloaded: dict[str, Path] = {}


class HubError(UserError):
    """A repository of the Hub cannot be used; the message says what to do."""


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether a source of weights is a repository: a string with the prefix, never a `Path`."""
    return isinstance(source, str) and source.startswith(PREFIX)


def download(source: str, choose: Choose, parts: Parts) -> Path:
    """Downloads chosen files of a repository, unless they are in the cache.

    Without a connection, files of an earlier download are used. A second call in a process returns
    the same path, also if the branch has moved.

    Args:
      source: `hf-hub:ORG/NAME`, of the branch `main`; or with `@REVISION`, a branch, tag or commit.
      choose: says which files.
      parts: says which others they name.

    Returns:
      The path of the last chosen file in a snapshot folder of the cache, with the others beside it.
      It is a link to a file with another name: do not resolve it.

    Raises:
      HubError: the name is malformed, `huggingface_hub` is not installed, there is no such
        repository or revision or no access to it, it does not have what is wanted, or it can
        neither be downloaded nor found in the cache.
      KeyboardInterrupt: with a message that says what to do.
    """
    repository, at, revision = source.removeprefix(PREFIX).partition("@")
    revision = revision if at else "main"
    if not _NAME.fullmatch(repository) or not _REVISION.fullmatch(revision):
        raise HubError(f"{source!r} is not {PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION")
    if source in _downloaded and _downloaded[source].exists():
        return _downloaded[source]
    try:
        from huggingface_hub import constants
    except ImportError as error:
        problem = "needs the package huggingface_hub: pip install 'drl_jax[hub]'"
        raise HubError(f"{source} {problem}") from error
    try:
        path = _download(source, repository, revision, choose, parts)
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


def to_download(source: str, choose: Choose) -> int | None:
    """Bytes of the chosen files of a repository that are not in the cache; None: not known.

    Raises the errors of `download`, but not where there is no connection.
    """
    repository, _, revision = source.removeprefix(PREFIX).partition("@")
    try:
        from huggingface_hub import HfApi, constants, try_to_load_from_cache
    except ImportError:
        return None  # `download` says so.
    revision = revision or "main"
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(
            repository, revision=revision, timeout=timeout, files_metadata=True
        )
    except Exception:  # Of many types; `download` explains what concerns the user.
        return None
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    wanted = choose(source, sizes)
    is_there = functools.partial(try_to_load_from_cache, repository, revision=info.sha)
    missing = [name for name in wanted if not isinstance(is_there(name), str)]
    return None if None in map(sizes.get, missing) else sum(map(sizes.get, missing))


def resolved_revision(path: Path) -> str:
    """The commit of a path that `download` returned; empty for one outside a snapshot folder."""
    commit, in_cache = path.parent.name, path.parent.parent.name == "snapshots"
    return commit if in_cache and _COMMIT.fullmatch(commit) else ""


def _download(source: str, repository: str, revision: str, choose: Choose, parts: Parts) -> Path:
    """The file in the cache; it comes last: where it is, the others are too."""
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        # The default is to wait forever.
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(repository, revision=revision, timeout=timeout)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    # No connection, offline mode, a proxy or a server that fails.
    except Exception as error:
        return _cached(source, repository, revision, choose, parts, error)
    for name in choose(source, [sibling.rfilename for sibling in info.siblings or ()]):
        path = Path(hf_hub_download(repository, name, revision=revision))
        # The others are of the same commit, even if the branch moves now.
        revision = path.parent.name
    for part in parts(path):
        hf_hub_download(repository, part.name, revision=revision)
    return path


def _cached(
    source: str, repository: str, revision: str, choose: Choose, parts: Parts, error: Exception
) -> Path:
    """The file in the cache; raises `error` if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        wanted = choose(source, [path.name for path in folder.iterdir() if path.is_file()])
    except (LocalEntryNotFoundError, HubError):
        raise error from None
    path = folder / wanted[-1]
    if absent := [part.name for part in parts(path) if not part.exists()]:
        missing = f"{absent[0]} is missing" + f" with {len(absent) - 1} more" * (len(absent) > 1)
        raise HubError(f"{source} is not complete in the cache: {missing}")
    return path


def _explanation(source: str, repository: str, revision: str, error: Exception) -> str:
    """One line for an error of `huggingface_hub`."""
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    log_in = "log in with `hf auth login` or HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{source} is gated: accept its terms on {hub}/{repository}, and {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        problem = "or it is private: check the name"
        return f"{hub} has no repository {repository}, {problem}, or {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        what = "give a branch, tag or commit hash"
        return f"{repository} on {hub} has no revision {revision}: {what}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{source} is not in the cache {cache}, and HF_HUB_OFFLINE forbids its download"
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or cache
        return f"{source} cannot be stored: {where}: {error.strerror}; HF_HOME moves the cache"
    return (
        f"{source} is not in the cache {cache}, and its download from {hub} failed"
        f" ({one_line(error)}); check the connection and try again, copy the cache of another"
        f" machine, or download the files of {hub}/{repository} elsewhere and name their folder"
    )
