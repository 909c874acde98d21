"""What the templates of the page show, from the answers of the API."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from drl_jax.search.addresses import format_clock
from drl_jax.search.hits import format_timestamp

# Columns of the timeline's curve.
_COLUMNS = 240
# Share of the score above which the marks of start and end are mentioned.
_MUCH = 1 / 3
_EXAMPLES = {
    "shapes": (
        "a red circle moves to the left",
        "a green triangle shrinks",
        "a blue square grows , a yellow circle sways",
    ),
}
_OTHER_EXAMPLES = ("a person talks to the camera", "a dog plays outside", "someone cooks a meal")


def examples(dataset: str) -> Sequence[str]:
    """Queries to try with a model that was trained on a dataset."""
    name = dataset.partition("_")[0]
    return _EXAMPLES.get(name, _OTHER_EXAMPLES)


def timeline_curve(heat: Sequence[dict[str, float]], duration: float) -> str:
    """The path of an SVG area, 240 wide and 100 high: the best score of the windows at each time.

    Args:
      heat: windows with start, end and score.
      duration: of the video, seconds.
    """
    if not heat:
        return ""
    scores = np.array([window["score"] for window in heat])
    low, high = float(scores.min()), float(scores.max())
    # The lowest score is still seen: the curve has a floor.
    level = 0.12 + 0.88 * (scores - low) / (high - low) if high > low else np.ones(len(scores))
    columns = np.zeros(_COLUMNS)
    for window, value in zip(heat, level, strict=True):
        first = int(_COLUMNS * min(window["start"] / duration, 1))
        last = max(first + 1, int(np.ceil(_COLUMNS * min(window["end"] / duration, 1))))
        columns[first:last] = np.maximum(columns[first:last], value)
    points = " ".join(
        f"L{number} {100 - 100 * value:.0f} L{number + 1} {100 - 100 * value:.0f}"
        for number, value in enumerate(columns)
    )
    return f"M0 100 {points} L{_COLUMNS} 100 Z"


def table(explanation: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of words and frames; `heat` is the similarity scaled to 0 ... 1."""
    words = explanation["words"]
    if not words:
        return []
    similarity = np.array([word["similarity"] for word in words])
    low, high = float(similarity.min()), float(similarity.max())
    heat = (similarity - low) / (high - low or 1)
    largest = max(word["weight"] for word in words) or 1
    best = similarity.argmax(axis=1)
    return [
        {
            "word": word["word"],
            "share": word["weight"],
            "length": word["weight"] / largest,
            "cells": [
                {"similarity": value, "heat": float(h), "best": column == best[row]}
                for column, (value, h) in enumerate(zip(word["similarity"], heat[row], strict=True))
            ],
        }
        for row, word in enumerate(words)
    ]


def marks_note(share: float) -> str:
    """One sentence where much of a score rests on the marks of the sentence; else empty."""
    if share < _MUCH:
        return ""
    return (
        f"{share:.0%} of the score rests on the marks that the model puts before and after the"
        " sentence: on the sentence as a whole, not on one word."
    )


def span(moment: dict[str, Any]) -> str:
    """A moment in words: 0:12 to 0:18; with tenths if it is short."""
    start, end = moment["start"], moment["end"]
    show = format_clock if end - start >= 1.5 else format_timestamp
    return f"{show(start)} to {show(end)}"


def duration(seconds: float) -> str:
    """A length in words: 6 s, or 1:02 from a minute on."""
    if seconds < 1.5:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 59.5 else format_clock(seconds)


def extent(hit: dict[str, Any]) -> str:
    """How much of a video its best moment is: 6 s of 5:28."""
    moment = hit["moments"][0]
    seconds = moment["end"] - moment["start"]
    if seconds >= 0.95 * hit["duration"]:
        return f"the whole video, {duration(seconds)}"
    return f"{duration(seconds)} of {duration(hit['duration'])}"


def file_name(path: str) -> str:
    """The name of a file, without its folder."""
    return PurePosixPath(path).name


def moment_name(like: str) -> str:
    """PATH@SECONDS as the page shows it: the name of the file, and the time."""
    path, _, seconds = like.rpartition("@")
    try:
        return f"{file_name(path)} at {format_clock(float(seconds))}"
    except ValueError:
        return like
