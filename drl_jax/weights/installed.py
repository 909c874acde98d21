"""Weights that are installed with the package; they have a name instead of a path."""

import json
from pathlib import Path

from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.files import sha256

# NAME.safetensors and NAME.json, its record: how it was made, its metrics and its sha256.
DIRECTORY = Path(__file__).parent / "files"
NAMES = ("shapes_clip",)


class InstalledWeightsError(UserError):
    """A file of this package is missing or damaged."""


def installed_path(name: str) -> Path:
    """The path of the weights of a name in `NAMES`; their hash was compared with their record.

    Raises:
      InstalledWeightsError: the installed file or its record is missing or damaged.
      Unavailable: one of them cannot be read.
    """
    path = DIRECTORY / f"{name}.safetensors"
    try:
        recorded = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
        found = sha256(path)
    except FileNotFoundError as error:
        raise _unusable(name, Path(error.filename), "is missing") from error
    except OSError as error:
        raise Unavailable(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _unusable(name, path.with_suffix(".json"), "is damaged") from error
    if found != recorded:
        raise _unusable(name, path, "is damaged: its sha256 is not that of its record")
    return path


def _unusable(name: str, file: Path, problem: str) -> InstalledWeightsError:
    return InstalledWeightsError(
        f"the weights {name} cannot be used: {file} {problem}; reinstall drl_jax, or in a clone run"
        f" `git checkout -- drl_jax/weights/files`"
    )
