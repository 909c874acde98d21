"""Weights that are installed with this package, by name."""

import json
from pathlib import Path

from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.files import sha256

# NAME.safetensors and NAME.json, its record: how it was made, its metrics and its sha256.
DIRECTORY = Path(__file__).parent / "files"
NAMES = ("shapes_clip",)


class InstallationError(UserError):
    """Files of this package are missing or damaged."""


def path_of(name: str) -> Path:
    """The path of the weights of a name in NAMES; their hash is that of their record.

    Raises:
      InstallationError: the file or its record is missing or damaged.
      Unavailable: one of them cannot be read.
    """
    path = DIRECTORY / f"{name}.safetensors"
    record = path.with_suffix(".json")
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))["sha256"]
        if sha256(path) == recorded:
            return path
        problem = f"{path} is damaged: its sha256 is not that of its record"
    except FileNotFoundError as error:
        problem = f"{error.filename} is missing"
    except OSError as error:
        raise Unavailable(path, error) from error
    except (ValueError, KeyError, TypeError):
        problem = f"{record} is damaged"
    raise InstallationError(
        f"the weights {name} cannot be used: {problem}; reinstall drl_jax, or in a clone run"
        " `git checkout -- drl_jax/hub/files`"
    )
