"""Weights that are installed with the package; they have a name instead of a path."""

import json
import os
from pathlib import Path

from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import sha256

# NAME.safetensors and NAME.json, its record: how it was made, its metrics and its sha256.
DIRECTORY = Path(__file__).parent / "files"
NAMES = ("shapes_clip",)


class InstalledWeightsError(UserError):
    """A file of this package is missing or damaged."""


def weights_path(source: str | os.PathLike) -> Path:
    """The path of a file of weights.

    Args:
      source: a path; or one of `NAMES` as a string, also if a file of that name exists.

    Returns:
      The path, or that of the installed file, whose hash was compared with its record.

    Raises:
      InstalledWeightsError: the installed file or its record is missing or damaged.
    """
    if source not in NAMES:
        return Path(source)
    path = DIRECTORY / f"{source}.safetensors"
    try:
        recorded = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
        found = sha256(path)
    except FileNotFoundError as error:
        raise _unusable(source, Path(error.filename), "is missing") from error
    except OSError as error:
        raise _unusable(
            source, Path(error.filename or path), f"is unreadable: {error.strerror}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _unusable(source, path.with_suffix(".json"), "is damaged") from error
    if found != recorded:
        raise _unusable(source, path, "is damaged: its sha256 is not that of its record")
    return path


def _unusable(name: str, file: Path, problem: str) -> InstalledWeightsError:
    return InstalledWeightsError(
        f"the weights {name} cannot be used: {file} {problem}; reinstall drl_jax, or in a clone run"
        f" `git checkout -- drl_jax/weights/files`"
    )
