"""Classes of one's own: files that commands execute (`--plugin`), and where each class is from."""

import ast
import contextlib
import linecache
import re
import sys
import traceback
import types
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drl_jax.runtime.errors import UserError, one_line

# Builders of datasets by name; `data_prep.datasets` has those of the package.
DATASETS: dict[str, type] = {}


class Origin(NamedTuple):
    """Where a registered class is from.

    Attributes:
      qualified_name: of the class.
      file: name of the file that registered it; empty: a notebook or a script, which has none that
        `--plugin` could execute.
      content: of the file, or the source of the class; empty: unknown.
    """

    qualified_name: str
    file: str
    content: bytes


_origins: dict[type, Origin] = {}
# The file that is executed, and its content.
_executed: tuple[str, bytes] | None = None


def origin_of(cls: type | None) -> Origin | None:
    """Where a class is from; None if it was not registered, as those of the package."""
    return _origins.get(cls)


def register(kind: str, name: str, cls: type, registry: MutableMapping[str, Any]) -> bool:
    """Adds a class to a registry; returns whether it replaces another class.

    It replaces one of the same module and name, as when a cell of a notebook runs again.

    Raises:
      UserError: the name is not one, or another class has it.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise UserError(f"the name of a {kind} has letters, digits and _ only, not {name!r}")
    known = registry.get(name)
    if name in registry and (known is None or _qualified_name(known) != _qualified_name(cls)):
        owner = "a part of drl_jax" if known not in _origins else _qualified_name(known)
        raise UserError(f"the {kind} {name!r} exists, it is {owner}; choose another name")
    registry[name] = cls
    if cls is not known:
        _origins[cls] = _find_origin(cls)
    return known not in (None, cls)


def register_dataset(name: str, builder: type) -> None:
    """Makes a subclass of `data_prep.retrieval_builder.RetrievalBuilder` the dataset `name`.

    Raises:
      UserError: it reads no annotations, or the name is not one or taken.
    """
    if not isinstance(builder, type) or not hasattr(builder, "read_annotations"):
        raise UserError(f"a dataset is a subclass of RetrievalBuilder, not {builder!r}")
    register("dataset", name, builder, DATASETS)


def load_plugins(paths: Sequence[str]) -> None:
    """Executes the files that a user named.

    Raises:
      UserError: a file cannot be read, raises an exception or registers nothing; or two have one
        name.
    """
    global _executed
    names = [Path(path).name for path in paths]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two files of --plugin are called {repeated[0]}; rename one")
    for path, file in zip(paths, names, strict=True):
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"--plugin={path}: {error.strerror}") from error
        # With a dot, since TFDS names a `Builder` by its package.
        module = types.ModuleType(f"drl_jax_plugins.{Path(path).stem}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module
        before, _executed = len(_origins), (file, content)
        try:
            exec(compile(content, str(path), "exec"), module.__dict__)
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == str(path)]
            line = lines[-1] if lines else getattr(error, "lineno", None)
            reason = str(error) if isinstance(error, UserError) else one_line(error)
            where = f", line {line}" if line else ""
            raise UserError(f"--plugin={path}{where}: {reason}") from error
        finally:
            _executed = None
        if len(_origins) == before:
            raise UserError(
                f"--plugin={path} registers nothing; call drl_jax.register_interaction,"
                " register_temporal_head, register_feature_extractor or register_dataset in it"
            )


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _find_origin(cls: type) -> Origin:
    name = _qualified_name(cls)
    if _executed is not None:
        return Origin(name, *_executed)
    file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
    if cls.__module__ != "__main__" and file.endswith(".py"):
        return Origin(name, Path(file).name, Path(file).read_bytes())
    # `inspect.getsource` finds no class of a notebook; its functions know the text of their cell.
    functions = (value for value in vars(cls).values() if isinstance(value, types.FunctionType))
    for function in functions:
        cell = "".join(linecache.getlines(function.__code__.co_filename))
        with contextlib.suppress(SyntaxError):
            for node in ast.walk(ast.parse(cell)):
                if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
                    return Origin(name, "", ast.get_source_segment(cell, node).encode())
    return Origin(name, "", b"")
