"""The search page: a sentence, its hits playing from their best moment, and explanations.

The page loads nothing from other hosts. The server serves only files of the index, and only while
they are unchanged since they were indexed.
"""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from drl_jax.models.tokenizers.base import END, START
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.search.explain import Explanation, format_timestamp
from drl_jax.search.hits import Hit
from drl_jax.search.rows import IndexedVideo
from drl_jax.search.session import SearchSession
from drl_jax.search.snapshot import IndexSnapshot

_PAGE = Path(__file__).parent / "page"
_LOOPBACK = ("127.0.0.1", "localhost")
# Maximum hits per request.
_MAX_HITS = 50
_HEADERS = {
    # Loads nothing from other hosts, and cannot be embedded in another page.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline';"
        " img-src 'self'; media-src 'self'; form-action 'self'; base-uri 'none';"
        " frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def serve(directory: Path, model: RetrievalModel | None, *, host: str, port: int, top: int) -> None:
    """Serves the page until it is interrupted.

    Args:
      directory: of the index.
      model: see `SearchSession`.
      host: name or address to listen on.
      port: 0 chooses a free one.
      top: number of hits, unless the request has another.

    Raises:
      UserError: the index cannot be opened, or the address is not available.
    """
    app = make_app(directory, model, top=top, hosts=_LOOPBACK if host in _LOOPBACK else ("*",))
    listener = _listen(host, port)
    print(
        f"{app.state.videos} videos on http://{host}:{listener.getsockname()[1]}/  (Ctrl-C stops)",
        flush=True,
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        print()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on --host={host} --port={port} ({reason}); --port=0 chooses a free one"
        ) from error
    return listener


def make_app(
    directory: Path, model: RetrievalModel | None, *, top: int, hosts: tuple[str, ...] = _LOOPBACK
) -> Starlette:
    """Creates the ASGI application; answers one query, so that the first is not slow.

    Args:
      directory: of the index.
      model: see `SearchSession`.
      top: number of hits.
      hosts: accepted values of the Host header; refuses DNS rebinding.

    Raises:
      UserError: the index cannot be opened, or `top` is too large.
    """
    _number_of_hits(str(top))
    session = SearchSession(directory, model)
    templates = Jinja2Templates(_PAGE)
    templates.env.filters["format_timestamp"] = format_timestamp
    searching = threading.Lock()  # A query uses all cores.

    def page(request: Request) -> Response:
        context: dict[str, Any] = {"query": request.query_params.get("q"), "top": top}
        status = 200
        try:
            context["top"] = _number_of_hits(request.query_params.get("top", str(top)))
            index = session.snapshot()
            context |= {"videos": len(index.videos), "folder": index.folder}
            if context["query"] is not None:
                with searching:
                    context |= _found(index, context["query"], context["top"])
        except UserError as error:
            context["error"], status = str(error), 400
        return templates.TemplateResponse(
            request, "page.html", context, status_code=status, headers=_HEADERS
        )

    def of_video(answer: Callable[[IndexSnapshot, IndexedVideo], Response]) -> Callable:
        def endpoint(request: Request) -> Response:
            try:
                index = session.snapshot()
                video = index.video_at(request.path_params["path"])
                if video is None:
                    return PlainTextResponse("no such video in the index", 404, _HEADERS)
                return answer(index, video)
            except UserError as error:
                return PlainTextResponse(str(error), 503, _HEADERS)

        return endpoint

    def video(index: IndexSnapshot, video: IndexedVideo) -> Response:
        # A file that was replaced could be a link to any file.
        if not index.is_unchanged(video):
            return PlainTextResponse("the file has changed since it was indexed", 409, _HEADERS)
        return FileResponse(index.folder / video.path, headers=_HEADERS)

    def frames(index: IndexSnapshot, video: IndexedVideo) -> Response:
        return Response(index.thumbnails(video), media_type="image/jpeg", headers=_HEADERS)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/videos/{path:path}", of_video(video)),
            Route("/frames/{path:path}", of_video(frames)),
            Mount("/static", StaticFiles(directory=_PAGE / "static")),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )
    session.search(["warm-up"], top)
    app.state.videos = len(session.videos)
    return app


def _number_of_hits(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_HITS:
        raise UserError(f"the number of videos must be 1 to {_MAX_HITS}, not {text!r}")
    return int(text)


def _found(index: IndexSnapshot, query: str, top: int) -> dict[str, Any]:
    """Answers a query with the variables of the template."""
    (hits,) = index.search([query], top)
    (tokens,) = index.model.token_strings([query])
    truncated = len(tokens) == index.model.config.data.max_words
    return {
        "hits": [_shown(hit) for hit in hits],
        "tokens_used": sum(token not in (START, END) for token in tokens) if truncated else None,
    }


def _shown(hit: Hit) -> dict[str, Any]:
    moment = hit.moments[0]
    explanation = moment.explanation
    attribution = explanation.attribution
    return {
        "rank": hit.rank,
        "score": hit.score,
        "path": hit.video.path,
        "moment": moment.peak,
        "times": explanation.times,
        "words": _rows(explanation),
        "frames": _bars(attribution.frame_weight),
        "best": int(attribution.frame_contribution.argmax()),
    }


def _rows(explanation: Explanation) -> list[dict[str, Any]]:
    """Rows of the table, one per word; `heat` is the similarity scaled to 0 ... 1."""
    similarity = explanation.attribution.similarity
    low, high = float(similarity.min()), float(similarity.max())
    heat = (similarity - low) / (high - low or 1)
    best = similarity.argmax(axis=1)
    return [
        {
            "word": word,
            "cells": [
                {"similarity": float(s), "heat": float(h), "best": column == best[row]}
                for column, (s, h) in enumerate(zip(similarity[row], heat[row], strict=True))
            ],
            "bar": bar,
        }
        for row, (word, bar) in enumerate(
            zip(explanation.words, _bars(explanation.attribution.token_weight), strict=True)
        )
    ]


def _bars(weights: Any) -> list[dict[str, float]]:
    largest = float(max(weights)) or 1
    return [{"weight": float(w), "length": float(w) / largest} for w in weights]
