"""A server of the search page, and what its answers are checked with."""

import contextlib
import dataclasses
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from support.commands import start_interruptible

RATE = 4  # Frames a second of the clips of `shapes`.


@dataclasses.dataclass
class Served:
    """A running server on the index of a folder."""

    process: subprocess.Popen
    port: int
    videos: Path
    index: Path
    temporary: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self, method: str, path: str, **headers: str) -> http.client.HTTPConnection:
        """A connection on which the headers of a request were sent; the path is sent unchanged."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        return connection

    def respond(self, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        """The response and its body."""
        response = self.start("GET", path, **headers).getresponse()
        return response, response.read()

    def get(self, path: str, **headers: str) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        response, body = self.respond(path, **headers)
        return response.status, response.headers["Content-Type"], body

    def post(self, path: str, body: bytes, kind: str = "application/octet-stream"):
        """Status and JSON of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, body, {"Content-Type": kind})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def json(self, path: str) -> dict:
        status, kind, body = self.get(path)
        assert (status, kind) == (200, "application/json"), body
        return json.loads(body)


def join_clips(clips: list[Path], out: Path, codec: str) -> None:
    """Writes clips of four frames a second as one video."""
    with av.open(str(out), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for clip in clips:
            with av.open(str(clip)) as source:
                for frame in source.decode(video=0):
                    picture = frame.reformat(64, 64, "rgb24").to_ndarray()
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def port_of(url: str) -> int:
    return int(url.split("/")[2].rpartition(":")[2])


@contextlib.contextmanager
def serving(index: Path, temporary: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server until the block ends, and the address that it printed."""
    process = start_interruptible(
        [sys.executable, "-m", "drl_jax.search", "serve", f"--index={index}", "--port=0", *flags],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    line = process.stdout.readline()
    assert " videos on http://" in line, process.communicate()
    yield process, line.split()[3]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors, errors
    assert not [*temporary.iterdir()]


TYPES = {
    **{"object": dict, "array": list, "string": str},
    **{"integer": int, "boolean": bool, "number": (int, float), "null": type(None)},
}


def check_schema(value: object, schema: dict, schemas: dict) -> None:
    """Asserts that a value has the types and the fields of a JSON schema, and no others."""
    if "$ref" in schema:
        return check_schema(value, schemas[schema["$ref"].split("/")[-1]], schemas)
    if "oneOf" in schema:
        schema = schema["oneOf"][0 if value is None else 1]
        return check_schema(value, schema, schemas)
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    assert isinstance(value, tuple(np.ravel([TYPES[name] for name in types[:1]]))) or (
        value is None and "null" in types
    ), (value, schema)
    assert value in schema.get("enum", [value])
    if isinstance(value, list):
        for item in value:
            check_schema(item, schema["items"], schemas)
    if isinstance(value, dict) and "required" in schema:
        fields, required = dict(schema.get("properties", {})), set(schema["required"])
        for part in schema.get("allOf", ()):
            base = schemas[part["$ref"].split("/")[-1]]
            fields |= base["properties"]
            required |= set(base["required"])
        assert set(value) == required == set(fields)
        for name, item in value.items():
            check_schema(item, fields[name], schemas)
