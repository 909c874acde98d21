"""The download helper against a server on this machine."""

import hashlib
import http.server
import threading

import pytest

from data_prep.download_clip import MODELS, DownloadError, address_of, download

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges; `/short` hangs up half-way."""

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
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.address = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def test_a_whole_download_is_checked_and_not_repeated(server, tmp_path):
    target = tmp_path / "weights" / "a.pt"
    for _ in range(2):
        download(f"{server.address}/a.pt", SHA256, target)
    assert target.read_bytes() == CONTENT
    assert server.starts == [0]
    assert [path.name for path in target.parent.iterdir()] == ["a.pt"]


def test_an_interrupted_download_continues(server, tmp_path):
    target = tmp_path / "a.pt"
    with pytest.raises(DownloadError, match=r"run it again|What has come so far is kept"):
        download(f"{server.address}/short", SHA256, target)
    assert not target.exists()
    half = (tmp_path / "a.pt.part").stat().st_size
    assert half == len(CONTENT) // 2
    download(f"{server.address}/a.pt", SHA256, target)
    assert server.starts == [0, half]
    assert target.read_bytes() == CONTENT


def test_a_whole_part_is_only_checked(server, tmp_path):
    (tmp_path / "a.pt.part").write_bytes(CONTENT)
    download(f"{server.address}/a.pt", SHA256, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == CONTENT


def test_another_file_is_refused(server, tmp_path):
    with pytest.raises(DownloadError, match="not 0000"):
        download(f"{server.address}/a.pt", "0" * 64, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.pt").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="is another file"):
        download(f"{server.address}/a.pt", SHA256, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == b"mine"


def test_without_a_connection_it_says_what_to_do(tmp_path):
    with pytest.raises(DownloadError, match=r"copy the file to .*a\.pt yourself"):
        download("http://127.0.0.1:9/a.pt", SHA256, tmp_path / "a.pt")


def test_the_address_holds_the_digest():
    for model, sha256 in MODELS.items():
        assert sha256 in address_of(model)
    assert address_of("ViT-L/14@336px").endswith("/ViT-L-14-336px.pt")
