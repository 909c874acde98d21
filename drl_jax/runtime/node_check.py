"""Whether a node of a cluster can do the work of this process.

The functions also run on nodes that lack this package: they are sent as code (cloudpickle, by
value), so the module imports the standard library only.
"""

import hashlib
import importlib
import importlib.metadata
import platform
from pathlib import Path
from typing import NamedTuple

_MOUNT = "mount the same file system there, at the same path"


class Needs(NamedTuple):
    """What a node must have.

    Attributes:
      python: version, MAJOR.MINOR.
      packages: versions by name of the distribution.
      modules: for each package of this project its version and the hash of its sources, by name.
      tokens: files in the directories that nodes read and write, absolute, each after the flag that
        names its directory.
      example: a file that nodes read and its size; None if there is none.
    """

    python: str
    packages: dict[str, str]
    modules: dict[str, tuple[str, str]]
    tokens: tuple[tuple[str, str], ...] = ()
    example: tuple[str, int] | None = None


def needs_of_driver(packages: list[str], modules: list[str]) -> Needs:
    """The versions of this process, without files."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    return Needs(_python(), versions, {name: _identity(name) for name in modules})


def problem_of_node(needs: Needs, mark: str = "") -> str:
    """What this node lacks, and what to do; empty if it lacks nothing.

    Writes a file beside each token with the suffix `mark`, for which the driver looks; none if it
    is empty.
    """
    return _other_versions(needs) or _unseen_files(needs, mark)


def _other_versions(needs: Needs) -> str:
    if _python() != needs.python:
        return f"has Python {_python()}, not {needs.python}; install {needs.python} there"
    for name, (version, source) in needs.modules.items():
        try:
            found, found_source = _identity(name)
        except ImportError as error:
            return f"cannot import {name} ({error}); install version {version} there"
        if found != version:
            return f"has {name} {found}, not {version}; install {version} there"
        if found_source != source:
            return f"has other source files of {name}; install the same ones there"
    for name, version in needs.packages.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"has no {name}; install {name}=={version} there"
        if found != version:
            return f"has {name} {found}, not {version}; install {name}=={version} there"
    return ""


def _unseen_files(needs: Needs, mark: str) -> str:
    for flag, token in needs.tokens:
        where = f"{flag}, {Path(token).parent}"
        try:
            Path(token).stat()
        except OSError as error:
            return f"does not see {where} ({error.strerror}); {_MOUNT}"
        try:
            if mark:
                Path(token + mark).write_text(mark)
        except OSError as error:
            return f"cannot write to {where} ({error.strerror}); free space or allow it there"
    if needs.example is not None:
        path, size = needs.example
        try:
            found = Path(path).stat().st_size
        except OSError as error:
            return f"does not see {path} ({error.strerror}); {_MOUNT}"
        if found != size:
            return f"sees another {path}; {_MOUNT}"
    return ""


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _identity(name: str) -> tuple[str, str]:
    """Version and hash of the sources of a package of this project; ImportError: it is absent."""
    module = importlib.import_module(name)
    root = Path(module.__file__).parent
    digest = hashlib.sha256()
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for relative in sorted(files):
        # A link in a checkout and files in a wheel; no result depends on them.
        if not relative.startswith("configs/"):
            digest.update(f"{relative}\0".encode() + files[relative].read_bytes())
    return getattr(module, "__version__", ""), digest.hexdigest()
