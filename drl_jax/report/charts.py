"""The charts of a report, as figures of matplotlib in the style of `svg.page_style`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from drl_jax.evaluation.metrics import DIRECTIONS, RECALLS, Ranks
from drl_jax.report.findings import Hubness, rank_shares
from drl_jax.report.svg import LINE, SERIES

# Inches. A phone shows a chart at about this width, so its letters have their size.
_WIDTH, _HEIGHT = 4.6, 2.7
# Most bars of a histogram.
_BINS = 40
DIRECTION_NAMES = {"t2v": "text to video", "v2t": "video to text"}
# Groups of scalars of the training that are drawn: title, unit, tags and their names.
_CURVES = (
    ("Recall on val", "%", {"eval/t2v_R1": "t2v R@1", "eval/v2t_R1": "v2t R@1"}),
    ("Contrastive loss", "", {"train/contrastive_loss": "loss"}),
    ("CDCR loss", "", {"train/cdcr_loss": "loss"}),
    ("Gradient norm", "", {"train/grad_norm": "norm"}),
    ("Scale of the logits", "", {"train/logit_scale": "scale"}),
    (
        "Learning rates",
        "",
        {"train/lr": "heads", "train/lr_clip": "backbone"},
    ),
    (
        "Entropy of the weights",
        "nats",
        {"train/word_entropy": "words", "train/frame_entropy": "frames"},
    ),
    ("Examples a second", "", {"train/examples_per_second": "rate"}),
)


def _axes(width: float = _WIDTH, height: float = _HEIGHT) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y")
    return figure, axes


def metrics_figure(metrics: Mapping[str, Any], intervals: Mapping[str, Any]) -> Figure:
    """Recall at 1, 5 and 10 in both directions, and pair accuracy, with their intervals."""
    figure, axes = _axes()
    names = [f"R@{k}" for k in RECALLS]
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
        places = np.arange(len(names)) + 0.4 * number - 0.2
        bars = axes.bar(
            places, shares, 0.38, color=SERIES[number], label=DIRECTION_NAMES[direction]
        )
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
        present = {
            tag: name for tag, name in tags.items() if any(tag in values for values in history)
        }
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
    figure, axes = _axes(_WIDTH, 3.7)
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
    axes.hist(
        hubness.occurrences, np.arange(0, most + step + 1, step) - 0.5, color=SERIES[0], rwidth=0.9
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axvline(hubness.expected, color=SERIES[1], linestyle="--", label="mean")
    axes.set_xlabel(f"captions with the video among their first {hubness.k}")
    axes.set_ylabel("videos")
    axes.legend()
    return figure
