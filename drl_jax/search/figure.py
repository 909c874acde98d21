"""Figure of one query and one video: similarities of tokens and frames, and their weights."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from drl_jax.runtime.errors import UserError
from drl_jax.search.explain import Explanation, format_timestamp

# Width of a frame's column and height of a token's row, inches.
_COLUMN, _ROW = 1.1, 0.42
_BLUE, _MOMENT = "#3b6ea5", "#d1603d"


def save_figure(path: Path, explanation: Explanation, frames: np.ndarray, title: str) -> None:
    """Draws the token-frame interaction, as the paper does, and writes it to a file.

    A heat map of the similarities of tokens (rows) and frames (columns), with the frames above it,
    the weights of tokens to its right and the weights of frames below it. The best frame of each
    token is outlined, and so is the frame that contributes most to the score.

    Args:
      path: a file with a suffix that matplotlib writes: .png, .svg, .pdf.
      explanation: L tokens and F frames.
      frames: uint8 [F, S, S, 3].
      title: title of the figure.

    Raises:
      UserError: the file cannot be written.
    """
    words, count = explanation.words, len(explanation.times)
    attribution = explanation.attribution
    height, width = _ROW * len(words), _COLUMN * count
    figure = Figure(figsize=(width + 3.4, height + 3.6), layout="constrained")
    grid = figure.add_gridspec(
        3, 2, height_ratios=(_COLUMN, max(height, 0.8), 1.0), width_ratios=(width, 1.4)
    )
    figure.suptitle(title, fontsize=11, wrap=True)

    columns = np.arange(count)
    best = int(np.argmax(attribution.frame_contribution))
    pictures = figure.add_subplot(grid[0, 0])
    for column, frame in enumerate(frames):
        pictures.imshow(frame, extent=(column - 0.47, column + 0.47, 0, 1), aspect="auto")
    pictures.set_xlim(-0.5, count - 0.5)
    pictures.set_ylim(0, 1)
    pictures.set_yticks([])
    pictures.set_xticks(columns, [format_timestamp(time) for time in explanation.times], fontsize=9)
    pictures.xaxis.tick_top()
    pictures.spines[:].set_visible(False)
    pictures.add_patch(_outline(best - 0.48, 0.01, 0.96, 0.98, _MOMENT))

    heat = figure.add_subplot(grid[1, 0])
    image = heat.imshow(attribution.similarity, aspect="auto", cmap="viridis")
    heat.set_yticks(np.arange(len(words)), words, fontsize=10)
    heat.set_xticks([])
    low, high = image.get_clim()
    for row, values in enumerate(attribution.similarity):
        for column, value in enumerate(values):
            dark = value < (low + high) / 2
            heat.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
        found = int(np.argmax(values))
        heat.add_patch(_outline(found - 0.47, row - 0.47, 0.94, 0.94, "white"))

    right = figure.add_subplot(grid[1, 1])
    right.barh(np.arange(len(words)), attribution.token_weight, color=_BLUE)
    right.set_ylim(len(words) - 0.5, -0.5)
    right.set_yticks([])
    right.set_xlim(0, 1)
    right.set_title("word weight", fontsize=9)
    right.tick_params(labelsize=8)
    right.spines[["top", "right"]].set_visible(False)

    below = figure.add_subplot(grid[2, 0])
    colors = [_MOMENT if column == best else _BLUE for column in columns]
    below.bar(columns, attribution.frame_weight, color=colors, width=0.6)
    below.set_xlim(-0.5, count - 0.5)
    below.set_ylim(0, 1)
    below.set_xticks([])
    below.set_ylabel("frame weight", fontsize=9)
    below.tick_params(labelsize=8)
    below.spines[["top", "right"]].set_visible(False)
    below.set_xlabel(
        f"cosine of words and frames; best moment {format_timestamp(explanation.moment)}",
        fontsize=9,
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write --out={path} ({reason})") from error


def _outline(x: float, y: float, width: float, height: float, color: str) -> Rectangle:
    return Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=2)
