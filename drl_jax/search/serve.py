"""The search page and its JSON API.

The page is a few templates that show the answers of the API, and a little script. It loads nothing
from other hosts. The server serves only files of the index, and only while they are unchanged since
they were indexed; pages of other sites learn nothing from it, not even which files exist.
"""

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from drl_jax.runtime.errors import UserError
from drl_jax.search.access import Access, CheckAccess, parse_hosts
from drl_jax.search.addresses import MAX_HITS, PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.media import Media
from drl_jax.search.routes import api_routes, file_routes, page_routes
from drl_jax.search.session import Index

_ONLY_HERE = Access()
# Bytes of a request without its body.
_MAX_REQUEST = 1 << 20
_HEADERS = {
    # Loads nothing from other hosts, and cannot be embedded in another page.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline';"
        " img-src 'self'; media-src 'self'; connect-src 'self'; form-action 'self';"
        " base-uri 'none'; frame-ancestors 'none'"
    ),
    # A page elsewhere cannot find out by <img> or <script> which addresses exist.
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _AddHeaders:
    """Adds _HEADERS to every response."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def serve(
    index: Index,
    *,
    host: str,
    port: int,
    top: int,
    max_upload: int,
    allowed_hosts: str = "",
    needs_token: bool = True,
) -> None:
    """Serves the page of an index until it is interrupted.

    Args:
      index: open.
      host: name or address to listen on.
      port: 0 chooses a free one.
      top: number of hits, unless the request has another.
      max_upload: MB of a video that is sent as a query, at most.
      allowed_hosts: names that lead to the server, besides `host`; separated by commas.
      needs_token: whether requests need a token if other machines can send them.

    Raises:
      UserError: the address is not available, or `top` is too large.
    """
    hosts = parse_hosts(allowed_hosts)
    with _listening_errors(host, port):
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    access = Access.to(host, address[0], hosts, needs_token=needs_token)
    app = make_app(index, top=top, max_upload=max_upload, access=access)
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        with _listening_errors(host, port):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        url = access.url(host, *listener.getsockname()[:2])
        config = uvicorn.Config(
            app,
            log_level="warning",
            timeout_graceful_shutdown=1,
            # So that a long query gets an answer that says what is wrong.
            http="h11",
            h11_max_incomplete_event_size=_MAX_REQUEST,
        )
        try:
            print(f"{len(index.videos)} videos on {url}  (Ctrl-C stops)", flush=True)
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print()


@contextlib.contextmanager
def _listening_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on --host={host} --port={port} ({reason}); --port=0 chooses a free one"
        ) from error


def make_app(index: Index, *, top: int, max_upload: int, access: Access = _ONLY_HERE) -> Starlette:
    """Creates the ASGI application; answers one query, so that the first is fast; see `serve`."""
    if not 1 <= top <= MAX_HITS:
        raise UserError(f"--top must be a number from 1 to {MAX_HITS}, not '{top}'")
    media, api, max_video = Media(), SearchAPI(index, top), 1_000_000 * max_upload

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        media.close()
        api.sent.close()

    app = Starlette(
        routes=[
            *page_routes(api, max_video),
            *api_routes(api, max_video),
            *file_routes(index, media),
        ],
        middleware=[
            Middleware(_AddHeaders),
            Middleware(CheckAccess, access=access),
        ],
        exception_handlers={Exception: _internal_error},
        lifespan=lifespan,
    )
    api.search(PageQuery("warm-up"))
    return app


def _internal_error(request: Request, error: Exception) -> Response:
    return PlainTextResponse("internal error; the server's log has it", 500, _HEADERS)
