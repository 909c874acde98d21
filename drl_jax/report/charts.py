"""The charts of a report: figures of matplotlib as SVG elements in the page's colors.

A figure is drawn with colors that stand for CSS variables; `inline` replaces them. So one picture
is readable in a light and a dark page, and its text is text.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from drl_jax.evaluation.metrics import DIRECTIONS, METRICS, Ranks
from drl_jax.report.findings import Hubness, rank_shares

# Colors that stand for those of the page: of text, of lines between things, and of data.
INK, LINE, SERIES = "#fe0001", "#fe0002", ("#fe0003", "#fe0004", "#fe0005")
_CSS = {
    INK: "currentColor",
    LINE: "var(--line)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)},
}
_STYLE = {
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LINE),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    "axes.axisbelow": True,
    "axes.prop_cycle": mpl.cycler(color=SERIES),
    "font.size": 9,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
}
# Pixels per inch of pictures within a figure.
_DPI = 96
# Inches. A phone shows a chart at about this width, so its letters have their size.
_WIDTH, _HEIGHT = 4.6, 2.7
# Most bars of a histogram.
_BINS = 40
DIRECTION_NAMES = {"t2v": "text to video", "v2t": "video to text"}
_ENTROPIES = {"train/word_entropy": "words", "train/frame_entropy": "frames"}
# Groups of scalars of the training that are drawn: title, unit, tags and their names.
_CURVES = (
    ("Recall on val", "%", {"eval/t2v_R1": "t2v R@1", "eval/v2t_R1": "v2t R@1"}),
    ("Contrastive loss", "", {"train/contrastive_loss": "loss"}),
    ("CDCR loss", "", {"train/cdcr_loss": "loss"}),
    ("Gradient norm", "", {"train/grad_norm": "norm"}),
    ("Scale of the logits", "", {"train/logit_scale": "scale"}),
    ("Learning rates", "", {"train/lr": "heads", "train/lr_clip": "backbone"}),
    ("Entropy of the weights", "nats", _ENTROPIES),
    ("Examples a second", "", {"train/examples_per_second": "rate"}),
)


@contextlib.contextmanager
def page_style() -> Iterator[None]:
    """Figures that are created in the block have the colors of the page."""
    with mpl.rc_context(_STYLE):
        yield


def inline(figure: Figure, name: str, label: str) -> Markup:
    """An SVG element of a figure of `page_style`.

    At the width `--width`, a variable of CSS, its letters have their size. Ids depend on `name`,
    which is unique in the page. `label` is for those who do not see the picture.
    """
    file, empty = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The browser has fonts for them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", dpi=_DPI, metadata=empty)
    text = file.getvalue()
    # Without the XML declaration, a style that would apply to the whole page, and the names of
    # groups, which are the same in all figures.
    text = text[text.index("<svg") :]
    text = re.sub(r"(?s)\s*<metadata>.*?</metadata>", "", text)
    text = re.sub(r"(?s)\s*<defs>\s*<style.*?</style>\s*</defs>", "", text)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    for color, variable in _CSS.items():
        text = text.replace(color, variable)
    start, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', start)[0]
    width = f"{72 * figure.get_figwidth():.0f}px"
    return Markup(
        f'<svg class="chart" role="img" aria-label="{escape(label)}" style="--width: {width}" {box}'
        f' xmlns:xlink="http://www.w3.org/1999/xlink">{rest}'
    )


def _axes(height: float = _HEIGHT) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y")
    return figure, axes


def metrics_figure(metrics: Mapping[str, Any], intervals: Mapping[str, Any]) -> Figure:
    """Recall at 1, 5 and 10 in both directions, and pair accuracy, with their intervals."""
    figure, axes = _axes()
    names = [name for name, metric in METRICS.items() if not metric.is_rank]
    for number, direction in enumerate(DIRECTIONS):
        rows = np.arange(len(names)) + 0.24 * number - 0.12
        values = [metrics[direction][name] for name in names]
        _intervals(axes, values, [intervals[direction][name] for name in names], rows, number)
        axes.plot([], [], "o-", color=SERIES[number], label=DIRECTION_NAMES[direction])
    if "pair_accuracy" in metrics:
        value, bounds = metrics["pair_accuracy"], intervals["pair_accuracy"]
        _intervals(axes, [value], [bounds], [len(names)], 2)
        names.append("pair\naccuracy")
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 102)
    axes.set_xlabel("%, with 95 % interval")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _intervals(axes: Any, values: Sequence, bounds: Sequence, rows: Sequence, series: int) -> None:
    low, high = np.array(bounds).T
    # A bound of the bootstrap can lie on the other side of a value by rounding.
    sides = np.maximum([values - low, high - values], 0)
    axes.errorbar(
        values, rows, xerr=sides, fmt="o", color=SERIES[series], markersize=5, capsize=3, lw=2
    )


def rank_figure(ranks: Ranks) -> Figure:
    """Histogram of the ranks of both directions."""
    figure, axes = _axes()
    for number, direction in enumerate(DIRECTIONS):
        names, shares = rank_shares(getattr(ranks, direction))
        places, label = np.arange(len(names)) + 0.4 * number - 0.2, DIRECTION_NAMES[direction]
        bars = axes.bar(places, shares, 0.38, color=SERIES[number], label=label)
        labels = [f"{share:.0f}" if share >= 0.5 else "" for share in shares]
        axes.bar_label(bars, labels, fontsize=7, padding=1)
    axes.set_xticks(np.arange(len(names)), names)
    axes.set_xlabel("rank of the right one")
    axes.set_ylabel("% of queries")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def curve_figures(history: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """Scalars of the training by step, by title; groups without values are left out."""
    figures = {}
    for title, unit, tags in _CURVES:
        present = {tag: name for tag, name in tags.items() if any(tag in v for v in history)}
        if not present:
            continue
        figure, axes = _axes(height=2.2)
        for tag, name in present.items():
            points = [(values["step"], values[tag]) for values in history if tag in values]
            # A single point is no line.
            marker = "o" if len(points) < 30 else ""
            axes.plot(*np.array(points).T, marker=marker, markersize=3, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.set_xlim(left=0)
        if len(present) > 1:
            axes.legend()
        figures[title] = figure
    return figures


def correlation_figure(correlation: np.ndarray) -> Figure:
    """A cross-correlation of text channels (rows) and video channels: [D, D]."""
    figure, axes = _axes(height=3.7)
    # The middle of the scale is 0, and a channel that nothing correlates with is pale.
    image = axes.imshow(correlation, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xlabel("video channel")
    axes.set_ylabel("text channel")
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.outline.set_edgecolor(LINE)
    return figure


def hub_figure(hubness: Hubness) -> Figure:
    """Histogram of the number of captions that return a video."""
    figure, axes = _axes(height=4.0)
    most = int(hubness.occurrences.max())
    step = -(-(most + 1) // _BINS)
    edges = np.arange(0, most + step + 1, step) - 0.5
    axes.hist(hubness.occurrences, edges, color=SERIES[0], rwidth=0.9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axvline(hubness.expected, color=SERIES[1], linestyle="--", label="mean")
    axes.set_xlabel(f"captions with the video among their first {hubness.k}")
    axes.set_ylabel("videos")
    axes.legend()
    return figure
