"""Addresses that the server answers: the page, its JSON API, and files of indexed videos."""

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from drl_jax.data.video import VIDEO_SUFFIXES
from drl_jax.runtime.errors import UserError
from drl_jax.search.addresses import (
    MAX_CHARACTERS,
    BadRequest,
    PageQuery,
    day_text,
    format_clock,
    parse_time,
    seconds_text,
    status_of,
)
from drl_jax.search.api import SearchAPI, state_of, video_of
from drl_jax.search.filters import Filters
from drl_jax.search.hits import format_timestamp
from drl_jax.search.media import MAX_PICTURE, Media, upload_routes
from drl_jax.search.open_index import IndexedVideo, OpenIndex
from drl_jax.search.session import Index

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


_PAGE = Path(__file__).parent / "page"
# Answers that name the content in `v` stay right.
_KEPT = {"Cache-Control": "private, max-age=86400"}
# Frames side by side in one answer.
_MOST_FRAMES = 64
_STATES = {
    "changed": "the file has changed since it was indexed; index the folder again",
    "missing": "the file is missing: it was moved, deleted, or its disk is not mounted",
}


class _FilePath(Convertor[str]):
    """The path of a file in an address; also with a newline, which `path` does not match."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("file", _FilePath())


# ---------------------------------------------------------------------- the page


def page_routes(api: SearchAPI, max_video: int) -> list[Route]:
    """The pages, and the parts of the first that its script loads.

    Args:
      api: answers.
      max_video: bytes of a video that is sent as a query, at most.
    """
    templates = Jinja2Templates(_PAGE)
    templates.env.trim_blocks = templates.env.lstrip_blocks = True
    for name in ("span", "duration", "extent", "table", "marks_note"):
        templates.env.filters[name] = globals()[name]
    templates.env.filters |= {"clock": format_clock, "seconds": seconds_text, "day": day_text}
    templates.env.filters |= {"name": file_name, "moment_name": moment_name}
    templates.env.globals |= {
        "curve": timeline_curve,
        "states": _STATES,
        "no_filters": Filters(),
        "video_suffixes": VIDEO_SUFFIXES,
        "max_picture": MAX_PICTURE,
        "max_video": max_video,
    }

    def page(request: Request) -> Response:
        # Where the request is wrong, the sentence need not be written again.
        sentence = request.query_params.get("q", "")[:MAX_CHARACTERS] or None
        context: dict[str, Any] = {"query": PageQuery(sentence), "index": {}, "status": 200}
        try:
            context["index"] = api.facts()
            context["query"] = query = PageQuery.of(request.query_params.multi_items())
            context["found"] = api.search(query)
            if query.video is not None:
                context["open"] = api.video(query)
        except UserError as error:
            context |= {"error": str(error), "status": status_of(error)}
        context["examples"] = examples(api.index.model.config.data.dataset)
        return templates.TemplateResponse(
            request, "page.html", context, status_code=context["status"]
        )

    def unsearchable(request: Request) -> Response:
        context: dict[str, Any] = {"index": {}, "status": 200}
        try:
            context |= {"index": api.facts(), **api.unsearchable()}
        except UserError as error:
            context |= {"error": str(error), "status": status_of(error)}
        return templates.TemplateResponse(
            request, "unsearchable.html", context, status_code=context["status"]
        )

    def part(name: str, answer: Callable[[PageQuery], dict[str, Any]], template: str) -> Callable:
        """A part of the page, which the script puts into it."""

        def endpoint(request: Request) -> Response:
            try:
                query = PageQuery.of(request.query_params.multi_items())
                context = {"query": query, name: answer(query)}
            except UserError as error:
                return PlainTextResponse(str(error), status_of(error))
            return templates.TemplateResponse(request, template, context)

        return endpoint

    return [
        Route("/", page),
        Route("/unsearchable", unsearchable),
        Route("/tiles", part("found", api.search, "tiles.html")),
        Route("/viewer", part("open", api.video, "viewer.html")),
    ]


# ---------------------------------------------------------------------- the API


def api_routes(api: SearchAPI, max_video: int) -> list[Route]:
    """The JSON API; see `page_routes`."""

    def of(answer: Callable[[PageQuery], dict[str, Any]]) -> Callable:
        def endpoint(request: Request) -> Response:
            try:
                return JSONResponse(answer(PageQuery.of(request.query_params.multi_items())))
            except UserError as error:
                return JSONResponse({"error": str(error)}, status_of(error))

        return endpoint

    def description(request: Request) -> Response:
        return FileResponse(_PAGE / "openapi.json", media_type="application/json")

    return [
        Route("/api/search", of(api.search)),
        Route("/api/video", of(api.video)),
        Route("/api/index", of(lambda query: api.facts())),
        Route("/api/unsearchable", of(lambda query: api.unsearchable())),
        Route("/api/openapi.json", description),
        *upload_routes(api.sent, max_video),
    ]


# ---------------------------------------------------------------------- files


def file_routes(index: Index, media: Media) -> list[Route | Mount]:
    """Videos of the index, their thumbnails, pictures and clips; and the files of the page."""

    def of_video(answer: Callable[[Request, OpenIndex, IndexedVideo], Response]) -> Callable:
        def endpoint(request: Request) -> Response:
            try:
                state = index.state()
                return answer(request, state, video_of(state, request.path_params["path"]))
            except UserError as error:
                return PlainTextResponse(str(error), status_of(error))

        return endpoint

    def video(request: Request, state: OpenIndex, video: IndexedVideo) -> Response:
        return FileResponse(_unchanged(state, video))

    def frames(request: Request, state: OpenIndex, video: IndexedVideo) -> Response:
        """One frame, or several side by side."""
        count = len(video.times)
        names = request.query_params.get("frames", request.query_params.get("frame", "0"))
        chosen = [_number("frame", name, count) for name in names.split(",")[:_MOST_FRAMES]]
        jpeg = state.frames_of(video, chosen)
        return Response(jpeg, media_type="image/jpeg", headers=_kept(request))

    def picture(request: Request, state: OpenIndex, video: IndexedVideo) -> Response:
        time = _time(request, "t", 0.0)
        if time > video.duration:
            raise BadRequest(f"t={time:g} is outside the video, which has {video.duration:.1f} s")
        jpeg = media.picture(_unchanged(state, video), time)
        return Response(jpeg, media_type="image/jpeg", headers=_kept(request))

    def clip(request: Request, state: OpenIndex, video: IndexedVideo) -> Response:
        start, end = _time(request, "start", 0.0), _time(request, "end", video.duration)
        file = media.clip(_unchanged(state, video), video, start, end)
        name = f"{PurePosixPath(video.path).stem} {start:.1f}-{end:.1f}.mp4"
        return FileResponse(file, filename=name, content_disposition_type="inline")

    return [
        Route("/videos/{path:file}", of_video(video)),
        Route("/frames/{path:file}", of_video(frames)),
        Route("/pictures/{path:file}", of_video(picture)),
        Route("/clips/{path:file}", of_video(clip)),
        Mount("/static", StaticFiles(directory=_PAGE / "static")),
    ]


def _unchanged(state: OpenIndex, video: IndexedVideo) -> Path:
    """The path of a file that is as it was indexed; one that was replaced could link anywhere."""
    found = state_of(state, video)
    if found != "ok":
        raise BadRequest(_STATES[found], {"changed": 409, "missing": 410}[found])
    return state.folder / video.path


def _number(name: str, text: str, count: int) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) >= count:
        raise BadRequest(f"{name} must be a number from 0 to {count - 1}, not {text[:100]!r}")
    return int(text)


def _time(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name)
    return default if text is None else parse_time(name, text)


def _kept(request: Request) -> dict[str, str]:
    return _KEPT if "v" in request.query_params else {}
