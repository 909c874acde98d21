"""The search page and its JSON API.

The page is a few templates that show the answers of the API, and a little script. It loads nothing
from other hosts. The server serves only files of the index, and only while they are unchanged since
they were indexed; pages of other sites learn nothing from it, not even which files exist.
"""

import contextlib
import dataclasses
import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import AsyncIterator, Iterable, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request, cookie_parser
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from drl_jax.runtime.errors import UserError
from drl_jax.search.addresses import MAX_HITS, PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.media import Media
from drl_jax.search.routes import api_routes, file_routes, page_routes
from drl_jax.search.session import Index

# A name or an IPv6 address, and a port.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z._-]+))(?::\d*)?")
_REQUIRED = (
    "this server requires its token: open the address that it printed, or send"
    " 'Authorization: Bearer TOKEN'"
)


def host_name(text: str) -> str:
    """A name or an address, with or without a port, in its one spelling; empty if it is neither."""
    match = _HOST.fullmatch(text)
    name = (match[1] or match[2]).rstrip(".").lower() if match else text
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name if match else ""
    return str(getattr(address, "ipv4_mapped", None) or address)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address; a name is none, but for localhost."""
    name = host_name(address)
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def parse_hosts(text: str) -> list[str]:
    """Reads names that are separated by commas.

    Raises:
      UserError: one is not the name or the address of a host.
    """
    hosts = [part.strip() for part in text.split(",") if part.strip()]
    for host in hosts:
        if not host_name(host):
            raise UserError(
                f"--allowed_hosts={text}: {host!r} is not the name of a host; write e.g."
                " videos.example.org, without http:// and path"
            )
    return hosts


@dataclasses.dataclass(frozen=True)
class Access:
    """Which requests a server accepts, besides those to loopback names.

    Attributes:
      names: other hosts that requests may name, as `host_name` writes them.
      token: what requests have to know; empty: nothing.
    """

    names: frozenset[str] = frozenset()
    token: str = ""

    @classmethod
    def to(cls, host: str, address: str, allowed: Iterable[str], *, needs_token: bool) -> "Access":
        """The access to an address; a token is made if other machines reach it.

        Args:
          host: name or address to listen on, as the user wrote it.
          address: that of the socket.
          allowed: other names that lead to the server.
          needs_token: whether other machines need a token.
        """
        names = frozenset(map(host_name, (host, _public_name(host, address), address, *allowed)))
        is_public = needs_token and not is_loopback(address)
        return cls(names, secrets.token_urlsafe() if is_public else "")

    def url(self, host: str, address: str, port: int) -> str:
        """The address of the page, for a browser; see `to`."""
        name = _public_name(host, address)
        name = f"[{name}]" if ":" in name else name
        return f"http://{name}:{port}/" + (f"?token={self.token}" if self.token else "")


def _public_name(host: str, address: str) -> str:
    """A name that leads to the server: no machine has the address that stands for all."""
    is_any = host_name(address) in ("0.0.0.0", "::")
    return socket.gethostname() if is_any else host


class CheckAccess:
    """ASGI middleware: answers requests that are not accepted in one line."""

    def __init__(self, app: ASGIApp, access: Access):
        """Wraps an application.

        Args:
          app: answers the others.
          access: which are accepted.
        """
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        answer = self._app
        if scope["type"] == "http":
            answer = self._refusal(scope) or self._sign_in(scope) or self._app
        await answer(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        host = Headers(scope=scope).get("host", "")
        # The address of the connection: no name that leads to it is an address.
        own = host_name((scope.get("server") or ("",))[0] or "")
        name = host_name(host)
        if not name or not (is_loopback(name) or name == own or name in self._access.names):
            line = f"this server is not {host[:100]!r}; --allowed_hosts adds names"
            return _line(scope, 400, line)
        return None

    def _sign_in(self, scope: Scope) -> Response | None:
        """Asks for the token, or exchanges that of an address for a cookie."""
        if not self._access.token:
            return None
        # Cookies do not distinguish the ports of a host.
        cookie = f"drl_jax_token_{(scope.get('server') or ('', 0))[1]}"
        parameters = scope["query_string"].decode("latin-1").split("&")
        tokens = [text for text in parameters if text.startswith("token=")]
        if scope["method"] == "GET" and any(self._is_token(text[6:]) for text in tokens):
            rest = "&".join(text for text in parameters if text not in tokens)
            path = "/" + scope["raw_path"].decode("latin-1").lstrip("/")
            answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
            answer.set_cookie(cookie, self._access.token, httponly=True, samesite="lax")
            return answer
        headers = Headers(scope=scope)
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = cookie_parser(headers.get("cookie", "")).get(cookie, "")
        if self._is_token(given):
            return None
        return _line(scope, 401, _REQUIRED, {"WWW-Authenticate": "Bearer"})

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self._access.token.encode())


def _line(scope: Scope, status: int, line: str, headers: dict[str, str] | None = None) -> Response:
    """One line, as the API or the page has it."""
    if scope["path"].startswith("/api/"):
        return JSONResponse({"error": line}, status, headers)
    return PlainTextResponse(line, status, headers)


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
