"""Files: atomic writes, sealed JSON objects, hashes, checks before parsing, and files of a folder.

Functions raise OSError, with the path, for what the operating system refuses.
"""

import contextlib
import errno
import hashlib
import json
import os
import pickletools
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# Key of the hash of an object that `seal` made.
_SEAL = "sha256"
# A text of a JSON file, with the colon after it if it is a key; or an end of an object.
_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]')


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds `path` to an error of the operating system in the block, which uses this file.

    `read` and `write` name no file; others name a temporary one beside it, or two files.
    """
    try:
        yield
    except OSError as error:
        if str(error.filename2 or error.filename or path).startswith(str(path)):
            error.filename = str(path)
            del error.filename2
        raise


# ---------------------------------------------------------------- atomic writes


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path` that replaces it when the block ends without an error.

    Readers see the old file or the whole new one; if `durable`, the new file is on disk when the
    block ends, also after a power failure. The directory must exist: to create it here would bring
    back that of a run or a checkpoint that was moved away meanwhile.
    """
    # Keeps two writers of one file apart; process ids are not unique across containers.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with naming(path):
            # Libraries make private files; this one has the mode of any other.
            unfinished.touch()
            mode = unfinished.stat().st_mode
            yield unfinished
            if unfinished.stat().st_mode != mode:
                unfinished.chmod(mode)
            if durable:
                _sync(unfinished)
            unfinished.replace(path)
            if durable:
                _sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    with replacing(path, durable=durable) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n", durable=durable)


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Yields a new private directory that becomes `target` when the block ends without an error.

    All its files are on disk before it gets its name: after a power failure `target` is complete,
    or absent. A killed process leaves a directory whose name ends in `.part`; an error, also that
    `target` exists, leaves nothing.
    """
    unfinished = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    unfinished.mkdir()
    try:
        yield unfinished
        for path in (*unfinished.rglob("*"), unfinished):
            _sync(path)
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_once(source: Path, target: Path) -> None:
    """Copies a file atomically; FileExistsError: the target exists with other content."""
    if target.exists():
        if sha256(source) != sha256(target):
            raise FileExistsError(errno.EEXIST, "it exists with other content", str(target))
        return
    with replacing(target) as unfinished:
        shutil.copyfile(source, unfinished)


# ---------------------------------------------------------------- JSON and pickles


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Adds a hash to a JSON object."""
    return {**values, _SEAL: json_sha256(values)}


def unseal(text: str) -> dict[str, Any]:
    """Parses a JSON object of `seal`; ValueError: it is not the one that was written."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    if _SEAL not in values:
        raise ValueError("its hash is missing")
    if values.pop(_SEAL) != json_sha256(values):
        raise ValueError("its content differs from its hash")
    return values


def json_sha256(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value; the order of an object's keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def parse_json(text: str) -> Any:
    """Parses JSON that people wrote.

    Raises:
      json.JSONDecodeError: it is not JSON, or an object has a key twice, of which `json.loads`
        would keep the last value.
      RecursionError: it is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise _repeated_key(text)
        return values

    return json.loads(text, object_pairs_hook=unique)


def _repeated_key(text: str) -> json.JSONDecodeError:
    objects: list[dict[str, int]] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "{":
            objects.append({})
        elif token[0] == "}":
            objects.pop()
        elif token[2]:
            key = json.loads(token[1])
            if (first := objects[-1].setdefault(key, token.start())) != token.start():
                where = json.JSONDecodeError("", text, first)
                message = f"the key {key!r} at line {where.lineno} column {where.colno} and again"
                return json.JSONDecodeError(f"an object has {message}", text, token.start())
    raise AssertionError("no key is repeated")


def check_memo(file: BinaryIO) -> None:
    """Checks the memo indices of the next pickle of a file, and goes back to its start.

    The standard unpickler allocates as many entries as an index in the file says; a few damaged
    bytes make that gigabytes.

    Raises:
      ValueError: an index is larger than the number of objects before it, or the file is not a
        pickle.
    """
    start = file.tell()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name.endswith("PUT") and argument > number:
            raise ValueError(f"object {argument} of a pickle with {number} so far")
    file.seek(start)


# ---------------------------------------------------------------- reading


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content; `path` needs a method `open` only."""
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_all(path: Path) -> None:
    """Reads a file, or all files below a directory, and forgets them.

    Libraries take a file that they may not look at for one that is absent; this raises OSError.
    """
    if path.is_dir():
        for entry in path.iterdir():
            read_all(entry)
    else:
        sha256(path)


def files_below(directory: Path) -> list[Path]:
    """The regular files below a directory, sorted.

    Links to folders are followed. A folder that several paths lead to is listed once: by its own
    path if that is below the directory, or else by the first link. `lost+found`, which a file
    system has for itself, is left out if this process may not read it. Any other folder that cannot
    be read is an OSError: its files are not absent.
    """
    return [directory / name for name in names_below(directory)]


def names_below(directory: Path, others: dict[str, OSError | None] | None = None) -> list[str]:
    """The paths of `files_below`, relative to the directory; light enough for millions of files.

    Adds to `others` the names of what is no file, e.g. links to nothing, and of what may not be
    listed, with the error, which is raised without `others`.
    """
    found, seen = [], set()

    def refuse(name: str, error: OSError) -> None:
        if others is not None and name:
            others[name] = None if name.endswith("lost+found") else error
        elif not name.endswith("lost+found"):
            raise error

    folders, links = [""], []
    while folders or links:
        # All links last, so that a folder is listed by its own path.
        folder = folders.pop() if folders else links.pop(0)
        path = directory / folder
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except PermissionError as error:
            refuse(folder, error)
            continue
        for entry in listed:
            name = f"{folder}/{entry.name}" if folder else entry.name
            # An entry knows what it is: most files need no system call of their own. A path ignores
            # links in a circle, which an entry does not.
            is_link = entry.is_symlink()
            kind = path / entry.name if is_link else entry
            try:
                if kind.is_dir():
                    (links if is_link else folders).append(name)
                elif kind.is_file():
                    found.append(name)
                elif others is not None:
                    others[name] = None
            except PermissionError as error:  # Of a link that leads where one may not look.
                refuse(name, error)
    # By the names of folders and files, as paths are compared.
    return sorted(found, key=lambda name: name.split("/"))
