"""Figures of similarities: of words and frames of one pair, and of all captions and videos."""

import io
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from drl_jax.models.interactions import Attribution

# Width of a frame's column and height of a token's row, inches.
_COLUMN, _ROW = 1.1, 0.42
_BLUE, _MOMENT = "#3b6ea5", "#d1603d"
# Perceptually uniform, also in grey and for colour-blind readers.
_COLORS = "viridis"
# Largest number of rows and of columns of a matrix that is drawn as it is.
_MOST_CELLS = 256


class _NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def interaction_figure(
    attribution: Attribution,
    words: Sequence[str],
    moments: Sequence[str],
    frames: np.ndarray,
    title: str,
    *,
    added: np.ndarray | None = None,
) -> Figure:
    """Draws the token-frame interaction of one pair, as the paper does.

    A heat map of tokens (rows) and frames (columns), with the frames above it, the weights of
    tokens to its right and those of frames below it. Outlined are the best frame of each token, and
    the frame that contributes most to the score.

    The attribution is of L tokens, `words`, and of F frames, uint8 [F, S, S, 3]; `moments` are
    their names, e.g. times. `added`, float [F], is what a reranker adds by each frame.
    """
    count = len(moments)
    height, width = _ROW * len(words), _COLUMN * count
    figure = _NotebookFigure(figsize=(width + 3.4, height + 3.6), layout="constrained")
    grid = figure.add_gridspec(
        3, 2, height_ratios=(_COLUMN, max(height, 0.8), 1.0), width_ratios=(width, 1.4)
    )
    # Captions may have dollar signs, which would begin a formula.
    figure.suptitle(title, fontsize=11, wrap=True, parse_math=False)

    columns = np.arange(count)
    best = int(np.argmax(attribution.frame_contribution))
    pictures = figure.add_subplot(grid[0, 0])
    for column, frame in enumerate(frames):
        pictures.imshow(frame, extent=(column - 0.47, column + 0.47, 0, 1), aspect="auto")
    pictures.set_xlim(-0.5, count - 0.5)
    pictures.set_ylim(0, 1)
    pictures.set_yticks([])
    pictures.set_xticks(columns, moments, fontsize=9)
    pictures.xaxis.tick_top()
    pictures.spines[:].set_visible(False)
    pictures.add_patch(_outline(best - 0.48, 0.01, 0.96, 0.98, _MOMENT))

    heat = figure.add_subplot(grid[1, 0])
    image = heat.imshow(attribution.similarity, aspect="auto", cmap=_COLORS)
    heat.set_yticks(np.arange(len(words)), words, fontsize=10, parse_math=False)
    heat.set_xticks([])
    low, high = image.get_clim()
    for row, values in enumerate(attribution.similarity):
        for column, value in enumerate(values):
            color = "white" if value < (low + high) / 2 else "black"
            place = {"ha": "center", "va": "center", "fontsize": 8}
            number = heat.text(column, row, f"{value:.2f}", color=color, **place)
            # It lies within its cell; to measure it takes most of the time of the layout.
            number.set_in_layout(False)
        found = int(np.argmax(values))
        heat.add_patch(_outline(found - 0.47, row - 0.47, 0.94, 0.94, "white"))

    right = figure.add_subplot(grid[1, 1])
    right.barh(np.arange(len(words)), attribution.token_weight, color=_BLUE)
    right.set_ylim(len(words) - 0.5, -0.5)
    right.set_yticks([])
    right.set_xlim(0, 1)
    right.set_title("word weight", fontsize=9)

    below = figure.add_subplot(grid[2, 0])
    colors = [_MOMENT if column == best else _BLUE for column in columns]
    below.bar(columns, attribution.frame_weight, color=colors, width=0.6)
    below.set_xlim(-0.5, count - 0.5)
    below.set_ylim(0, 1)
    below.set_xticks([])
    below.set_ylabel("frame weight", fontsize=9)
    for bars in (right, below):
        bars.tick_params(labelsize=8)
        bars.spines[["top", "right"]].set_visible(False)
    about = f"cosine of words and frames; best moment {moments[best]}"
    if added is not None:
        below.set_xticks(columns, [f"{value:+.3f}" for value in added])
        about += "; numbers: what the reranker adds to the score"
    below.set_xlabel(about, fontsize=9)
    return figure


def similarity_figure(sim_matrix: np.ndarray) -> Figure:
    """Draws a similarity matrix float32 [A, B], captions (rows) by videos (columns).

    Of a large matrix, each cell shows the largest similarity of a block of captions and videos: a
    diagonal of single pairs stays visible, and so does a video that is similar to all captions.
    """
    captions, videos = sim_matrix.shape
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.add_subplot()
    cells, block = block_maxima(sim_matrix, _MOST_CELLS)
    image = axes.imshow(
        cells, cmap=_COLORS, aspect="auto", interpolation="nearest", extent=(0, videos, captions, 0)
    )
    axes.set_xlabel("video")
    axes.set_ylabel("caption")
    of_blocks = "" if block == (1, 1) else f"\nlargest of each {block[0]} x {block[1]}"
    axes.set_title(f"similarity of {captions} captions and {videos} videos{of_blocks}", fontsize=11)
    figure.colorbar(image, ax=axes)
    return figure


def block_maxima(matrix: np.ndarray, most: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The largest value of each block (a, b) of a matrix [A, B], and (a, b).

    There are at most `most` rows and columns: [ceil(A / a), ceil(B / b)].
    """
    rows, columns = (-(-size // most) for size in matrix.shape)
    by_rows = np.maximum.reduceat(matrix, np.arange(0, matrix.shape[0], rows), axis=0)
    starts = np.arange(0, matrix.shape[1], columns)
    return np.maximum.reduceat(by_rows, starts, axis=1), (rows, columns)


def rendered(figure: Figure, dpi: int) -> np.ndarray:
    """The pixels of a figure, uint8 [H, W, 3]."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Characters that the font does not have are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _outline(x: float, y: float, width: float, height: float, color: str) -> Rectangle:
    return Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=2)
