"""The figure of `search explain`: one query and one video."""

from pathlib import Path

import numpy as np

from drl_jax.evaluation.figures import interaction_figure
from drl_jax.runtime.errors import UserError
from drl_jax.search.explain import Explanation, format_timestamp


def save_figure(path: Path, explanation: Explanation, frames: np.ndarray, title: str) -> None:
    """Draws the interaction of tokens and frames (`interaction_figure`) and writes it to a file.

    Args:
      path: a file with a suffix that matplotlib writes: .png, .svg, .pdf.
      explanation: L tokens and F frames.
      frames: uint8 [F, S, S, 3].
      title: title of the figure.

    Raises:
      UserError: the file cannot be written.
    """
    moments = [format_timestamp(time) for time in explanation.times]
    figure = interaction_figure(explanation.attribution, explanation.words, moments, frames, title)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write --out={path} ({reason})") from error
