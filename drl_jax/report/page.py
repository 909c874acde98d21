"""Renders a report as one HTML page that needs no other file, no script and no network."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from tqdm import tqdm

from drl_jax.evaluation.figures import interaction_figure, similarity_figure
from drl_jax.evaluation.metrics import DIRECTIONS, METRICS
from drl_jax.report.charts import (
    DIRECTION_NAMES,
    correlation_figure,
    curve_figures,
    hub_figure,
    inline,
    metrics_figure,
    page_style,
    rank_figure,
)
from drl_jax.report.collect import VIDEOS_OF_DUPLICATE, Channels, ReportData, WordFrameMap, summary

_FOLDER = Path(__file__).parent / "page"
# Bytes of all word x frame maps. Those of long videos have up to two million each; the maps that do
# not fit are left out, so that a page stays below 20 MB.
_MAP_BYTES = 10_000_000
# Most frames of a filmstrip.
_STRIP_FRAMES = 4


def render(data: ReportData) -> str:
    """The page of a report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": "{:.1f}".format, "rank": _rank, "bounds": _bounds}
    steps = int(max((values["step"] for values in data.history), default=0))
    with page_style():
        queries, left_out = _mapped_queries(data.maps)
        return environment.get_template("report.html").render(
            data=data,
            css=Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
            directions={name: DIRECTION_NAMES[name] for name in DIRECTIONS},
            names=list(METRICS),
            charts=_charts(data),
            curves={
                title: inline(figure, f"curve {title}", f"{title} over {steps} steps.")
                for title, figure in curve_figures(data.history).items()
            },
            queries=queries,
            left_out=left_out,
            channel_charts=_channel_charts(data.channels),
            strips={video: _filmstrip(frames) for video, frames in data.frames.items()},
            caption_of=_first_captions(data),
            videos_of_duplicate=VIDEOS_OF_DUPLICATE,
        )


def _charts(data: ReportData) -> dict[str, Markup]:
    """The charts of the whole evaluation, by name."""
    metrics, hubs = data.metrics, data.hubness
    first = {name: metrics[name]["R@1"] for name in DIRECTIONS}
    recalls = ", ".join(f"{name} R@1 {value:.1f} %" for name, value in first.items())
    charts = {
        "metrics": (
            metrics_figure(metrics, data.intervals),
            f"Recall at 1, 5 and 10 with 95 % intervals: {recalls}.",
        ),
        "ranks": (
            rank_figure(data.ranks),
            f"Histogram of ranks. {first['t2v']:.0f} % of the captions and {first['v2t']:.0f} % of"
            " the videos have rank 1.",
        ),
        "hubs": (
            hub_figure(hubs),
            f"Histogram of how often a video is among the first {hubs.k}; the mean is"
            f" {hubs.expected:.1f}, the largest number {hubs.occurrences.max()}.",
        ),
        "similarity": (
            similarity_figure(data.sim_matrix),
            "Similarity of all captions, rows, and all videos, columns.",
        ),
    }
    return {name: inline(figure, name, label) for name, (figure, label) in charts.items()}


def _mapped_queries(maps: list[WordFrameMap]) -> tuple[dict[int, list[tuple[int, Markup]]], int]:
    """By caption, the videos and pictures of its maps; and the number of maps that are left out."""
    queries: dict[int, list[tuple[int, Markup]]] = {}
    used = 0
    for number, shown in enumerate(tqdm(maps, "drawing maps", leave=False, disable=None)):
        picture = _map_picture(number, shown)
        used += len(picture)
        if used > _MAP_BYTES:
            return queries, len(maps) - number
        queries.setdefault(shown.caption, []).append((shown.video, picture))
    return queries, 0


def _map_picture(number: int, shown: WordFrameMap) -> Markup:
    moments = [f"frame {frame}" for frame in range(1, len(shown.frames) + 1)]
    figure = interaction_figure(shown.attribution, shown.words, moments, shown.frames, "")
    attribution = shown.attribution
    word = shown.words[int(attribution.token_weight.argmax())]
    frame = int(attribution.frame_contribution.argmax()) + 1
    label = (
        f"Similarity of {len(shown.words)} words and {len(moments)} frames. The word with the"
        f" largest weight is {word}; frame {frame} adds most to the similarity."
    )
    return inline(figure, f"map {number}", label)


def _channel_charts(found: Channels | None) -> list[dict[str, Any]]:
    """Picture, diagonal and rest of each correlation, in the order of time."""
    charts = []
    for name in ("before", "after"):
        correlation = found and getattr(found, name)
        if correlation is None:
            continue
        diagonal, rest = summary(correlation)
        label = (
            f"Correlation of text and video channels {name} training: mean of the diagonal"
            f" {diagonal:.2f}, mean magnitude of all else {rest:.2f}."
        )
        picture = inline(correlation_figure(correlation), f"channels {name}", label)
        charts.append({"name": name, "picture": picture, "diagonal": diagonal, "rest": rest})
    return charts


def _first_captions(data: ReportData) -> dict[int, str]:
    """The first caption of each video that is shown, by column."""
    rows = data.ranks.text_to_video.tolist()
    return {video: data.captions[rows.index(video)] for video in data.frames}


def _filmstrip(frames: np.ndarray) -> str:
    """Up to four evenly spaced frames [F, S, S, 3] side by side, a JPEG file as a data URI."""
    count = min(_STRIP_FRAMES, len(frames))
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    file = io.BytesIO()
    Image.fromarray(np.concatenate(frames[chosen], axis=1)).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _rank(value: float) -> str:
    """A rank as people write it; one of a tie can lie between two whole numbers."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _bounds(bounds: list[float]) -> str:
    return f"{bounds[0]:.1f} to {bounds[1]:.1f}"
