"""Where weights come from: a path, a name of installed weights, or a repository of the Hub."""

import os
from pathlib import Path

from drl_jax.weights import hub, installed


def weights_path(source: str | os.PathLike) -> Path:
    """The path of a file of weights, which is downloaded if it has to be.

    Args:
      source: a path; or, as a string, one of `installed.NAMES` or a repository `hf-hub:ORG/NAME`,
        also if there is a file or directory of that name.

    Raises:
      InstalledWeightsError: the installed file or its record is missing or damaged.
      HubError: see `hub.download`.
    """
    if hub.is_hub_name(source):
        return hub.download(source)
    if source in installed.NAMES:
        return installed.installed_path(source)
    return Path(source)
