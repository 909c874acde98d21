"""Errors about weights: what is wrong is said where it is found, and the file is named here."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drl_jax.runtime.errors import Unavailable, UserError, one_line, printable
from drl_jax.runtime.files import parse_json

_MAX_JSON_BYTES = 100 * 2**20


class WeightsError(UserError):
    """Weights that are damaged, dangerous or of an unknown form, or do not fit the model."""

    names_file = False  # whether the message has the path of the file; if not, `about` adds it


def refused(problem: str) -> WeightsError:
    """The error of a file that may be an attack."""
    return WeightsError(f"refused: {problem}")


@contextlib.contextmanager
def about(path: Path, mark: str = "") -> Iterator[None]:
    """Names the file in the errors of a block that reads it: WeightsError, OSError."""
    try:
        yield
    except WeightsError as error:
        if error.names_file:
            raise
        named = WeightsError(f"{path}{mark} {error}")
        named.names_file = True
        raise named from error
    except OSError as error:
        raise Unavailable(path, error) from error


def read_json(path: Path, *, is_optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no file, and it is optional.

    Raises WeightsError if it is damaged, and Unavailable if it cannot be read.
    """
    with about(path):
        if path.exists() and not (path.is_file() and path.stat().st_size <= _MAX_JSON_BYTES):
            raise WeightsError("is no regular file of at most 100 MB")
        try:
            content = parse_json(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            if not is_optional:
                raise
            return {}
        except (ValueError, RecursionError) as error:
            problem = f"is damaged: it is not JSON ({one_line(error)}); get it again"
            raise WeightsError(problem) from error
        if not isinstance(content, dict):
            raise WeightsError("is damaged: it is not a JSON object; get it again")
        return content


def some(names: list[str], most: int = 4) -> str:
    """The first few of a list of names, which may be anything."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name[:100]) for name in names[:most]) + more
