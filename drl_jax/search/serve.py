"""The search page and its JSON API.

The page is a few templates that show the answers of the API, and a little script. It loads nothing
from other hosts. The server serves only files of the index, and only while they are unchanged since
they were indexed; pages of other sites learn nothing from it, not even which files exist.
"""

import argparse
import contextlib
import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import AsyncIterator, Collection

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from drl_jax.runtime.errors import UserError
from drl_jax.search.addresses import MAX_HITS, ROOT, PageQuery, status_of
from drl_jax.search.api import SearchAPI
from drl_jax.search.routes import HEALTH, api_routes, file_routes, health_route, page_routes
from drl_jax.search.session import Index
from drl_jax.search.watch import folders_of, updating

# Bytes of a request without its body.
_MAX_REQUEST = 1 << 20
_HEADERS = {
    # Loads nothing from other hosts, and cannot be embedded in another page.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self';"
        " media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none';"
        " frame-ancestors 'none'"
    ),
    # A page elsewhere cannot find out by <img> or <script> which addresses exist.
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# A name or an IPv6 address, and a port.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z._-]+))(?::\d*)?")
_ROOT = re.compile(r"(?:/[0-9A-Za-z._~-]+)*")
_REQUIRED = (
    "this server requires its token: open the address that it printed, or send"
    " 'Authorization: Bearer TOKEN'"
)
_Host = str | ipaddress.IPv4Address | ipaddress.IPv6Address


def _parse_host(text: str) -> _Host:
    """A name or an address, with or without a port, in its one form; "" if it is neither."""
    match = _HOST.fullmatch(text)
    name = (match[1] or match[2]).rstrip(".").lower() if match else text
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name if match else ""
    return getattr(address, "ipv4_mapped", None) or address


def _is_loopback(host: _Host) -> bool:
    """Whether only this machine reaches an address; a name is none, but for localhost."""
    return host == "localhost" or getattr(host, "is_loopback", False)


def _parse_hosts(text: str) -> list[_Host]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    hosts = [_parse_host(name) for name in names]
    if "" in hosts:
        raise UserError(
            f"--allowed_hosts={text}: {names[hosts.index('')]!r} is not the name of a host; write"
            " e.g. videos.example.org, without http:// and path"
        )
    return hosts


class Access:
    """Which requests a server accepts: to its hosts or loopback, with the token if there is one."""

    def __init__(
        self,
        host: str,
        address: str,
        allowed: str = "",
        *,
        needs_token: bool = True,
        root_path: str = "",
    ):
        """The access to an address, for which the user wrote `host`, and to names in `allowed`.

        All addresses begin with `root_path`.
        """
        self.root = f"/{root_path.strip('/')}".rstrip("/")
        if not _ROOT.fullmatch(self.root):
            raise UserError(f"--root_path={root_path}: write a path such as /videos")
        found = _parse_host(address)
        # No machine has the address that stands for all.
        self._name = socket.gethostname() if getattr(found, "is_unspecified", False) else host
        self._hosts = {_parse_host(host), _parse_host(self._name), found, *_parse_hosts(allowed)}
        self.token = secrets.token_urlsafe() if needs_token and not _is_loopback(found) else ""

    def url(self, port: int) -> str:
        name = f"[{self._name}]" if ":" in self._name else self._name
        return f"http://{name}:{port}{self.root}/" + (f"?token={self.token}" if self.token else "")

    def below_root(self, scope: Scope, names: Collection[str]) -> Scope:
        """The scope with the root path before its path, where a proxy has cut that off.

        It has not if one of `names`, of all addresses here, follows: a folder /videos is below the
        root path /videos, too.
        """
        path, raw = scope["path"], scope["raw_path"]
        rest = path.removeprefix(self.root)
        if not self.root or path == self.root:
            return scope
        if rest == path or rest[0] != "/" or rest.split("/")[1] not in names:
            path, raw = self.root + path, self.root.encode() + raw
        return {**scope, "root_path": self.root, "path": path, "raw_path": raw}

    def refusal(self, scope: Scope) -> Response | None:
        """Refuses other hosts, asks for the token, or exchanges that of an address for a cookie."""
        request = Request(scope)
        host = _parse_host(text := request.headers.get("host", ""))
        # The address of the connection: no name that leads to it is an address.
        server, port = scope.get("server") or ("", 0)
        if not host or not (_is_loopback(host) or host in {_parse_host(server), *self._hosts}):
            return _line(
                scope, 400, f"this server is not {text[:100]!r}; --allowed_hosts adds names"
            )
        if not self.token or _inside(scope) == HEALTH:
            return None
        # Cookies do not distinguish the ports of a host.
        cookie = f"drl_jax_token_{port}"
        parameters = scope["query_string"].decode("latin-1").split("&")
        tokens = [text for text in parameters if text.startswith("token=")]
        if scope["method"] == "GET" and any(self._knows(text[6:]) for text in tokens):
            rest = "&".join(text for text in parameters if text not in tokens)
            path = "/" + scope["raw_path"].decode("latin-1").lstrip("/")
            answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
            answer.set_cookie(
                cookie,
                self.token,
                path=self.root or "/",
                secure=scope.get("scheme") == "https",
                httponly=True,
                samesite="lax",
            )
            return answer
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if self._knows(given if kind.lower() == "bearer" else request.cookies.get(cookie, "")):
            return None
        return _line(scope, 401, _REQUIRED, {"WWW-Authenticate": "Bearer"})

    def _knows(self, token: str) -> bool:
        """Whether a token is the right one, in constant time."""
        return hmac.compare_digest(token.encode(), self.token.encode())


def checked(app: ASGIApp, access: Access, names: Collection[str] = ()) -> ASGIApp:
    """ASGI middleware: refuses requests in one line, and adds _HEADERS to all answers.

    `names` are what the addresses of the application begin with, behind the root path.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = None
        if scope["type"] == "http":
            ROOT.set(access.root)
            scope = access.below_root(scope, names)
            refusal = access.refusal(scope)
            if refusal is None and scope["path"] == access.root:
                query = scope["query_string"].decode("latin-1")
                refusal = RedirectResponse(f"{access.root}/{query and f'?{query}'}", 307)
        await (refusal or app)(scope, receive, send_with_headers)

    return answer


def _inside(scope: Scope) -> str:
    """The path behind the root path."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _line(scope: Scope, status: int, line: str, headers: dict[str, str] | None = None) -> Response:
    if _inside(scope).startswith("/api/"):
        return JSONResponse({"error": line}, status, headers)
    return PlainTextResponse(line, status, headers)


def serve(index: Index, options: argparse.Namespace) -> None:
    """Serves the page of an index until it is interrupted; a UserError if the flags are wrong."""
    with _listener(options.host, options.port) as listener:
        address, port = listener.getsockname()[:2]
        access = Access(
            options.host,
            address,
            options.allowed_hosts,
            needs_token=not options.no_token,
            root_path=options.root_path,
        )
        app = make_app(index, options.top, options.max_upload, access)
        # With h11, a long query gets an answer that says what is wrong.
        limits = {"http": "h11", "h11_max_incomplete_event_size": _MAX_REQUEST}
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, **limits)
        try:
            print(f"{len(index.videos)} videos on {access.url(port)}  (Ctrl-C stops)", flush=True)
            if options.on_start is not None:
                options.on_start(access.url(port))
            follows = updating(index, folders_of(index), follows=True) if options.watch else None
            with follows or contextlib.nullcontext():
                uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print()


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        is_dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, dualstack_ipv6=is_dual)
    except OSError as error:
        # `create_server` adds the address to what the system says.
        reason = str(error.strerror).partition(" (while")[0]
        raise UserError(
            f"cannot listen on --host={host} --port={port} ({reason}); --port=0 chooses a free one"
        ) from error


def make_app(index: Index, top: int, max_upload: int, access: Access) -> Starlette:
    """Creates the ASGI application, and answers a query, so that the first one is fast."""
    if not 1 <= top <= MAX_HITS:
        raise UserError(f"--top must be a number from 1 to {MAX_HITS}, not '{top}'")
    api = SearchAPI(index, top, 1_000_000 * max_upload)
    api.search(PageQuery("warm-up"))
    api.facts()  # It looks for suggestions, too.

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        api.close()

    health = health_route(api, shows_reason=not access.token)
    routes = [*page_routes(api), *api_routes(api), *file_routes(api), health]
    names = {route.path.split("/")[1] for route in routes}
    app = Starlette(
        routes=routes,
        middleware=[Middleware(checked, access=access, names=names)],
        exception_handlers=dict.fromkeys((UserError, HTTPException, Exception), _error),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # To an address with the host that the proxy asked for.
    return app


def _error(request: Request, error: Exception) -> Response:
    if isinstance(error, UserError):
        return _line(request.scope, status_of(error), str(error))
    if isinstance(error, HTTPException):
        return _line(request.scope, error.status_code, error.detail, error.headers)
    return PlainTextResponse("internal error; the server's log has it", 500, _HEADERS)
