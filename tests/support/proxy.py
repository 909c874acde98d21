"""A reverse proxy with a path of its own, as nginx and others are set up."""

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOST = "videos.example.org"


@contextlib.contextmanager
def proxying(port: int, prefix: str, *, strips: bool) -> Iterator[str]:
    """Sends what is below `prefix` to a port here, as a proxy that ends TLS does; its address.

    `strips`: the server sees paths without the prefix.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(prefix):
                self.send_error(404, "the proxy has no such path")
                return
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            length = int(self.headers.get("Content-Length", 0))
            headers = {**self.headers, "Host": HOST, "X-Forwarded-Proto": "https"}
            path = self.path.removeprefix(prefix) if strips else self.path
            connection.request(self.command, path or "/", self.rfile.read(length), headers)
            response = connection.getresponse()
            body = response.read()
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
