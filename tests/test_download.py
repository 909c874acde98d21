"""Downloads of OpenAI's files with a local server."""

import hashlib
import http.server
import threading

import pytest
from support.commands import error_of

from drl_jax.hub import openai
from drl_jax.hub.openai import MODELS, DownloadError, download, url_of
from drl_jax.weights.download import main
from drl_jax.weights.source import to_download, weights_path

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges; `/short` closes the connection half-way."""

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.starts.append(start)
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = len(CONTENT) // 2 if self.path == "/short" else len(CONTENT)
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.starts = []
        # Polls often, because shutting down waits for the next poll.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.address = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def test_an_interrupted_download_continues(server, tmp_path):
    target = tmp_path / "a.pt"
    with pytest.raises(DownloadError, match="rerun the command to continue"):
        download(f"{server.address}/short", SHA256, target)
    assert not target.exists()
    half = (tmp_path / "a.pt.part").stat().st_size
    assert half == len(CONTENT) // 2
    download(f"{server.address}/a.pt", SHA256, target)
    assert server.starts == [0, half]
    assert target.read_bytes() == CONTENT
    # A complete one is only verified.
    download(f"{server.address}/a.pt", SHA256, target)
    target.rename(tmp_path / "a.pt.part")
    download(f"{server.address}/a.pt", SHA256, target)
    assert server.starts == [0, half, len(CONTENT)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_file_with_another_digest_is_an_error(server, tmp_path):
    with pytest.raises(DownloadError, match="not 0000"):
        download(f"{server.address}/a.pt", "0" * 64, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_without_a_connection_the_error_says_what_to_do(tmp_path):
    with pytest.raises(DownloadError, match=r"or copy the file to .*a\.pt"):
        download("http://127.0.0.1:9/a.pt", SHA256, tmp_path / "a.pt")


def test_a_model_is_downloaded_once_into_the_cache_of_openais_package(
    server, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(openai, "_SERVER", server.address)
    monkeypatch.setitem(MODELS, "ViT-B/32", SHA256)
    assert to_download("ViT-B/32") is None
    for _ in range(2):
        assert weights_path("ViT-B/32") == tmp_path / ".cache" / "clip" / "ViT-B-32.pt"
    assert server.starts == [0]
    assert to_download("fast") == 0


def test_the_url_contains_the_digest():
    for model, digest in MODELS.items():
        assert digest in url_of(model)
    assert url_of("ViT-L/14@336px").endswith("/ViT-L-14-336px.pt")


def test_the_command(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("drl_jax.hub.openai._SERVER", server.address)
    monkeypatch.setitem(MODELS, "ViT-B/32", SHA256)
    arguments = ["ViT-B/32", f"--out={tmp_path / 'weights'}"]
    assert main(arguments) == 0
    target = tmp_path / "weights" / "ViT-B-32.pt"
    assert target.read_bytes() == CONTENT
    assert f"train with --config.model.init={target}" in capsys.readouterr().out
    target.write_bytes(b"mine")
    line = error_of("drl_jax.weights.download", *arguments, capsys=capsys)
    assert line == (
        f"drl_jax.weights.download: {target} exists but is a different file; move or delete it"
    )
    assert target.read_bytes() == b"mine"
