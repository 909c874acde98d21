"""A picture of one query and one video: which word found which frame, and what each weighs."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from drl_jax.runtime.errors import UserError
from drl_jax.search.explain import Explanation, clock

# Inches of a frame's column and of a word's row.
_COLUMN, _ROW = 1.1, 0.42
_BLUE, _MOMENT = "#3b6ea5", "#d1603d"


def save_figure(path: Path, explanation: Explanation, frames: np.ndarray, title: str) -> None:
    """Draws the interaction picture of the paper (its figure of words and frames) to a file.

    Frames stand above the columns of a map of word by frame similarities; bars to its right are the
    words' weights, bars below it the frames' weights. The best frame of each word is framed, and
    the frame that adds most to the score is marked.

    Args:
      path: a file of a form that matplotlib writes, by its suffix: .png, .svg, .pdf.
      explanation: of L words and F frames.
      frames: uint8 [F, S, S, 3].
      title: the query and the video, say.

    Raises:
      UserError: the file cannot be written.
    """
    words, count = explanation.words, len(explanation.times)
    height, width = _ROW * len(words), _COLUMN * count
    figure = Figure(figsize=(width + 3.4, height + 3.6), layout="constrained")
    grid = figure.add_gridspec(
        3, 2, height_ratios=(_COLUMN, max(height, 0.8), 1.0), width_ratios=(width, 1.4)
    )
    figure.suptitle(title, fontsize=11, wrap=True)

    columns = np.arange(count)
    best = int(np.argmax(explanation.frame_shares))
    pictures = figure.add_subplot(grid[0, 0])
    for column, frame in enumerate(frames):
        pictures.imshow(frame, extent=(column - 0.47, column + 0.47, 0, 1), aspect="auto")
    pictures.set_xlim(-0.5, count - 0.5)
    pictures.set_ylim(0, 1)
    pictures.set_yticks([])
    pictures.set_xticks(columns, [clock(time) for time in explanation.times], fontsize=9)
    pictures.xaxis.tick_top()
    pictures.spines[:].set_visible(False)
    pictures.add_patch(_outline(best - 0.48, 0.01, 0.96, 0.98, _MOMENT))

    heat = figure.add_subplot(grid[1, 0])
    image = heat.imshow(explanation.similarity, aspect="auto", cmap="viridis")
    heat.set_yticks(np.arange(len(words)), words, fontsize=10)
    heat.set_xticks([])
    low, high = image.get_clim()
    for row, values in enumerate(explanation.similarity):
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
    right.barh(np.arange(len(words)), explanation.word_weights, color=_BLUE)
    right.set_ylim(len(words) - 0.5, -0.5)
    right.set_yticks([])
    right.set_xlim(0, 1)
    right.set_title("word weight", fontsize=9)
    right.tick_params(labelsize=8)
    right.spines[["top", "right"]].set_visible(False)

    below = figure.add_subplot(grid[2, 0])
    colors = [_MOMENT if column == best else _BLUE for column in columns]
    below.bar(columns, explanation.frame_weights, color=colors, width=0.6)
    below.set_xlim(-0.5, count - 0.5)
    below.set_ylim(0, 1)
    below.set_xticks([])
    below.set_ylabel("frame weight", fontsize=9)
    below.tick_params(labelsize=8)
    below.spines[["top", "right"]].set_visible(False)
    below.set_xlabel(
        f"cosine of words and frames, 0:00 = start; best moment {clock(explanation.moment)}",
        fontsize=9,
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write --out={path} ({reason})") from error


def _outline(x: float, y: float, width: float, height: float, color: str) -> Rectangle:
    return Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=2)
