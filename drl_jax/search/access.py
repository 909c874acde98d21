"""Who may use the server: the names under which it answers, and the token that it requires.

Browsers send the name in an address as the Host header. A page of another site, whose name its
owner lets lead to this machine (DNS rebinding), would otherwise be taken for a page of this server.
"""

import dataclasses
import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from drl_jax.runtime.errors import UserError

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
