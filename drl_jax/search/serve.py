"""The page: a sentence, the videos that it finds, playing from their best moment, and why.

Everything that the page loads comes from this program; of files, only those of the index, as they
were when they were indexed.
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

from drl_jax.pretrained import SearchModel
from drl_jax.runtime.errors import UserError
from drl_jax.search.explain import Explanation, clock
from drl_jax.search.session import Hit, SearchSession
from drl_jax.search.store import IndexedVideo

_PAGE = Path(__file__).parent / "page"
_LOOPBACK = ("127.0.0.1", "localhost")
# Of the number of hits that a request may ask for.
_MOST_HITS = 50
_HEADERS = {
    # Nothing from elsewhere, and nobody else's frame around it.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline';"
        " img-src 'self'; media-src 'self'; form-action 'self'; base-uri 'none';"
        " frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def serve(directory: Path, model: SearchModel | None, *, host: str, port: int, top: int) -> None:
    """Serves the page until it is interrupted.

    Args:
      directory: of the index.
      model: see `SearchSession`.
      host: name or address to listen on.
      port: 0 chooses a free one.
      top: hits of a query, unless the request says another number.

    Raises:
      UserError: the index cannot be opened, or the address cannot be had.
    """
    app = make_app(directory, model, top=top, hosts=_LOOPBACK if host in _LOOPBACK else ("*",))
    listener = _listen(host, port)
    print(
        f"{app.state.videos} videos on http://{host}:{listener.getsockname()[1]}/  (Ctrl-C ends)",
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
            f"cannot listen on --host={host} --port={port} ({reason}); --port=0 finds a free one"
        ) from error
    return listener


def make_app(
    directory: Path, model: SearchModel | None, *, top: int, hosts: tuple[str, ...] = _LOOPBACK
) -> Starlette:
    """The page as an ASGI application; answers one query to be ready for the first.

    Args:
      directory: of the index.
      model: see `SearchSession`.
      top: hits of a query.
      hosts: names under which the page may be asked for: another one is a foreign page's, whose
        name was pointed here.

    Raises:
      UserError: the index cannot be opened, or `top` is more than the page shows.
    """
    _number_of_hits(str(top))
    index = _OpenIndex(directory, model)
    templates = Jinja2Templates(_PAGE)
    templates.env.filters["clock"] = clock
    searching = threading.Lock()  # one query at a time has all cores

    def page(request: Request) -> Response:
        context: dict[str, Any] = {"query": request.query_params.get("q"), "top": top}
        status = 200
        try:
            context["top"] = _number_of_hits(request.query_params.get("top", str(top)))
            session = index.session()
            context |= {"videos": len(session.videos), "folder": session.folder}
            if context["query"] is not None:
                with searching:
                    context |= _found(session, context["query"], context["top"])
        except UserError as error:
            context["error"], status = str(error), 400
        return templates.TemplateResponse(
            request, "page.html", context, status_code=status, headers=_HEADERS
        )

    def of_video(answer: Callable[[SearchSession, IndexedVideo], Response]) -> Callable:
        def endpoint(request: Request) -> Response:
            try:
                session = index.session()
            except UserError as error:
                return PlainTextResponse(str(error), 503, _HEADERS)
            video = session.video_at(request.path_params["path"])
            if video is None:
                return PlainTextResponse("no such video in the index", 404, _HEADERS)
            return answer(session, video)

        return endpoint

    def video(session: SearchSession, video: IndexedVideo) -> Response:
        # What lies there now may be a link to anywhere.
        if not session.is_unchanged(video):
            return PlainTextResponse("it has changed since it was indexed", 409, _HEADERS)
        return FileResponse(session.folder / video.path, headers=_HEADERS)

    def frames(session: SearchSession, video: IndexedVideo) -> Response:
        return Response(session.thumbnails(video), media_type="image/jpeg", headers=_HEADERS)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/videos/{path:path}", of_video(video)),
            Route("/frames/{path:path}", of_video(frames)),
            Mount("/static", StaticFiles(directory=_PAGE / "static")),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )
    session = index.session()
    session.search(["ready"], top)
    app.state.videos = len(session.videos)
    return app


class _OpenIndex:
    """The session of an index, opened again when the index has changed."""

    def __init__(self, directory: Path, model: SearchModel | None):
        self._directory = directory
        self._session = SearchSession(directory, model)
        self._opening = threading.Lock()

    def session(self) -> SearchSession:
        with self._opening:
            if not self._session.is_current():
                self._session = SearchSession(self._directory, self._session.model)
            return self._session


def _number_of_hits(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_HITS:
        raise UserError(f"the number of videos is from 1 to {_MOST_HITS}, not {text!r}")
    return int(text)


def _found(session: SearchSession, query: str, top: int) -> dict[str, Any]:
    """What the page shows of a query's answer."""
    (hits,) = session.search([query], top)
    (tokens,) = session.model.tokens([query])
    longest = session.model.config.data.max_words
    return {
        "hits": [_shown(hit) for hit in hits],
        "cut_at": longest if len(tokens) == longest else None,
    }


def _shown(hit: Hit) -> dict[str, Any]:
    assert hit.explanation is not None  # the query is a sentence
    return {
        "rank": hit.rank,
        "score": hit.score,
        "path": hit.video.path,
        "moment": hit.explanation.moment,
        "times": hit.explanation.times,
        "words": _rows(hit.explanation),
        "frames": _bars(hit.explanation.frame_weights),
        "best": int(hit.explanation.frame_shares.argmax()),
    }


def _rows(explanation: Explanation) -> list[dict[str, Any]]:
    """Of each word: cells (similarity, its place between the smallest and the largest, best)."""
    similarity = explanation.similarity
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
            zip(explanation.words, _bars(explanation.word_weights), strict=True)
        )
    ]


def _bars(weights: Any) -> list[dict[str, float]]:
    largest = float(max(weights)) or 1
    return [{"weight": float(w), "length": float(w) / largest} for w in weights]
