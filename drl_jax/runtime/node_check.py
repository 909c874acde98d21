"""Whether a node of a cluster can do the work of this process.

The functions also run on nodes that lack this package: they are sent as code (cloudpickle, by
value), so the module imports the standard library only. Ray itself refuses nodes with another
version of Ray or Python.
"""

import hashlib
import importlib
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

_MOUNT = "mount the same file system there, at the same path"


class Needs(NamedTuple):
    """What a node must have.

    Attributes:
      packages: versions by name of the distribution.
      modules: for each package of this project its version and the hash of its sources, by name.
      tokens: flags, and a file in the directory that each names, which nodes read and write.
      example: a file that nodes read and its size; None if there is none.
    """

    packages: dict[str, str]
    modules: dict[str, tuple[str, str]]
    tokens: list[tuple[str, str]]
    example: tuple[str, int] | None


def problem_of_node(needs: Needs, mark: str = "") -> str:
    """What this node lacks, and what to do; empty if it lacks nothing.

    With `mark`, writes a file beside each token, with this suffix, for which the driver looks.
    """
    for name, (version, source) in needs.modules.items():
        try:
            found, found_source = identity(name)
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
            is_same = Path(path).stat().st_size == size
        except OSError as error:
            return f"does not see {path} ({error.strerror}); {_MOUNT}"
        if not is_same:
            return f"sees another {path}; {_MOUNT}"
    return ""


def identity(name: str) -> tuple[str, str]:
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
