"""`hf-hub:` names, with caches made by hand and a local server that speaks the Hub's protocol."""

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.commands import error_of, start_interruptible

import drl_jax
from drl_jax.convert import main as convert
from drl_jax.hub import repository
from drl_jax.hub.repository import HubError, resolved_revision
from drl_jax.weights import download
from drl_jax.weights.errors import WeightsError
from drl_jax.weights.source import PREFERRED, _wanted, choose_weights, to_download, weights_path

NAME = "hf-hub:org/tiny"
COMMIT, NEXT_COMMIT = "a1" * 20, "b2" * 20
CLOSED_PORT = "http://127.0.0.1:9"
FILES = {
    "config.json": b'{"model_type": "clip"}',
    "tokenizer.json": b"{}",
    "README.md": b"# tiny",
    "model.safetensors": bytes(range(256)) * 100,
    "pytorch_model.bin": b"not downloaded",
}


# ---------------------------------------------------------------- names

PARTS = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        *((PREFERRED[i:], name) for i, name in enumerate(PREFERRED)),
        (("pytorch_model.bin", "other.safetensors", "a.pt"), "pytorch_model.bin"),
        (("PE.pt", "config.json", "onnx/model.safetensors"), "PE.pt"),
        (("x.safetensors", "training_args.bin"), "x.safetensors"),
        ((*PARTS, "x.safetensors"), PARTS[1]),
    ],
)
def test_one_file_of_weights_is_chosen(names, chosen):
    assert choose_weights(names) == choose_weights(reversed(names)) == (chosen, "")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["b.pt", "a.safetensors"], "has several files of weights: a.safetensors, b.pt;"),
        ([PARTS[0], "config.json"], "has its weights in parts, without one of their usual lists"),
        (["README.md", "a/model.safetensors"], "has no weights: it has README.md;"),
        ([], "has no weights: it has no files;"),
        ([f"{i}.pt" for i in range(9)], "0.pt, 1.pt, 2.pt, 3.pt and 5 more;"),
    ],
)
def test_other_repositories_are_refused_in_one_line(names, problem):
    with pytest.raises(HubError) as raised:
        _wanted(NAME, names)
    assert f"{NAME} has " in str(raised.value)
    assert problem in str(raised.value)
    assert "supported are open_clip_model.safetensors, " in str(raised.value)


def test_malformed_names_are_refused():
    names = ("", "tiny", "org/", "/tiny", "org/tiny/model.pt", "org/ti ny", "org/tiny\n")
    for name in (*names, "org--x/tiny", "../tiny", "org/..", "org/tiny@", "org/tiny@../x"):
        with pytest.raises(HubError, match=r"is not hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION"):
            weights_path(f"hf-hub:{name}")


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"hf-hub:org/tiny needs .*pip install 'drl_jax\[hub\]'"):
        weights_path(NAME)


# ---------------------------------------------------------------- a cache without a connection


def use(monkeypatch, *, cache: Path, endpoint: str = CLOSED_PORT, offline: bool = False) -> None:
    """Sets what huggingface_hub reads from the environment at import, as in a new process."""
    monkeypatch.setattr(repository, "_downloaded", {})
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of huggingface_hub with one snapshot, of `main` and the tag `v1`; no connection."""
    cache = tmp_path / "hub"
    root = cache / "models--org--tiny"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    for i, name in enumerate(["config.json", "tokenizer.json", "model.safetensors"]):
        (root / "blobs" / str(i)).write_bytes(FILES[name])
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    for reference in ("main", "v1"):
        (root / "refs" / reference).write_text(COMMIT)
    use(monkeypatch, cache=cache)
    return cache


@pytest.mark.parametrize(
    ("offline", "revision"), [(False, ""), (True, ""), (True, "@main"), (False, "@v1")]
)
def test_without_a_connection_the_cache_serves(cache, monkeypatch, offline, revision):
    use(monkeypatch, cache=cache, offline=offline)
    path = weights_path(NAME + revision)
    assert path == cache / "models--org--tiny" / "snapshots" / COMMIT / "model.safetensors"
    assert (path.parent / "tokenizer.json").read_bytes() == b"{}"
    assert resolved_revision(path) == COMMIT


def test_a_path_outside_a_snapshot_has_no_revision():
    for folder in ("snapshots/main", COMMIT, "."):
        assert resolved_revision(Path(folder) / "model.safetensors") == ""


@pytest.mark.parametrize("name", ["hf-hub:org/tiny@v2", "hf-hub:org/other"])
def test_what_is_not_in_the_cache_is_one_line(cache, name, capsys, monkeypatch):
    line = error_of("drl_jax.weights.download", name, capsys=capsys)
    assert f"{name} is not in the cache {cache}, and its download from {CLOSED_PORT}" in line
    assert "Connection refused); check the connection" in line
    use(monkeypatch, cache=cache, offline=True)
    line = error_of("drl_jax.weights.download", name, capsys=capsys)
    assert f"{name} is not in the cache {cache}, and HF_HUB_OFFLINE forbids" in line


def test_weights_whose_file_is_gone_are_not_in_the_cache(cache):
    (cache / "models--org--tiny" / "blobs" / "2").unlink()
    with pytest.raises(HubError, match="is not in the cache"):
        weights_path(NAME)


# ---------------------------------------------------------------- a local server


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `org/tiny` as the Hub does; other repositories fail in the ways of the Hub."""

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._list(parts[3], self._commit(parts[5]))
        elif parts[2:3] == ["resolve"]:
            self._file(parts[1], parts[4], self._commit(parts[3]))
        else:  # The library asks for more than the files.
            self._send(404)

    do_HEAD = do_GET

    def _list(self, name, commit):
        if name == "missing":
            self._send(401, {"X-Error-Code": "RepoNotFound"})
        elif name == "broken":
            self._send(503)
        elif commit is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            hashes = {file: self.server.hash_of(file) for file in self.server.files}
            siblings = [
                {
                    "rfilename": file,
                    "size": len(content),
                    "lfs": {"sha256": hashes[file], "size": len(content), "pointerSize": 1},
                }
                for file, content in self.server.files.items()
            ]
            content = {"id": f"org/{name}", "sha": commit, "siblings": siblings}
            self._send(200, content=json.dumps(content).encode())

    def _file(self, name, file, commit):
        if name == "gated":
            self._send(403, {"X-Error-Code": "GatedRepo"})
            return
        if self.command == "GET":
            self.server.sent.append((file, commit))
        # Contents are the same in all commits.
        headers = {"ETag": f'"{file}"', "X-Repo-Commit": commit}
        self._send(200, headers, self.server.files[file], stalls=file == self.server.stalls_at)

    def _commit(self, revision):
        return {"main": self.server.main}.get(revision, revision if len(revision) == 40 else None)

    def _send(self, status, headers=(), content=b"", *, stalls=False):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:100] if stalls else content)
            if stalls:
                self.server.stalled.set()
                self.server.released.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.files, server.main, server.sent = dict(FILES), COMMIT, []
        server.hash_of = lambda file: hashlib.sha256(server.files[file]).hexdigest()
        server.stalls_at, server.stalled, server.released = "", threading.Event(), threading.Event()
        # Polls often, because shutting down waits for the next poll.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.address = f"http://127.0.0.1:{server.server_port}"
        server.cache = tmp_path / "home" / "hub"
        use(monkeypatch, cache=server.cache, endpoint=server.address)
        yield server
        server.released.set()
        server.shutdown()


def test_weights_and_their_descriptions_are_downloaded_once(server, monkeypatch):
    names = ("config.json", "tokenizer.json", "model.safetensors")
    assert to_download(NAME) == sum(len(FILES[name]) for name in names)
    path = weights_path(NAME)
    snapshot = server.cache / "models--org--tiny" / "snapshots" / COMMIT
    assert path == snapshot / "model.safetensors"
    assert to_download(NAME) == 0
    # Not README.md and pytorch_model.bin.
    assert len(list(snapshot.iterdir())) == 3
    for file in snapshot.iterdir():
        assert file.read_bytes() == FILES[file.name]
    # The weights come last: where they are, the others are too.
    assert server.sent == [(name, COMMIT) for name in names]
    use(monkeypatch, cache=server.cache, endpoint=server.address)
    assert weights_path(NAME) == path
    assert len(server.sent) == 3
    use(monkeypatch, cache=server.cache, offline=True)
    assert weights_path(NAME) == weights_path(f"{NAME}@{COMMIT}") == path


def test_a_download_with_another_hash_is_refused(server):
    server.hash_of = lambda file: "0" * 64
    with pytest.raises(HubError, match=r"config.json has another hash than 000000000000\.\.\., "):
        weights_path(NAME)
    server.hash_of = lambda file: hashlib.sha256(server.files[file]).hexdigest()
    assert weights_path(NAME).read_bytes() == FILES["model.safetensors"]


def test_a_branch_that_moves_is_followed_by_the_next_process(server, monkeypatch):
    assert resolved_revision(weights_path(NAME)) == COMMIT
    server.main = NEXT_COMMIT
    # Reading the weights and hashing them is about one file.
    assert resolved_revision(weights_path(NAME)) == COMMIT
    use(monkeypatch, cache=server.cache, endpoint=server.address)
    assert resolved_revision(weights_path(NAME)) == NEXT_COMMIT
    assert resolved_revision(weights_path(f"{NAME}@{COMMIT}")) == COMMIT


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:org/missing", "has no repository org/missing, or it is private: check the name"),
        ("hf-hub:org/gated", "org/gated is gated: accept its terms on {hub}/org/gated, and log in"),
        ("hf-hub:org/tiny@v9", "org/tiny on {hub} has no revision v9: give a branch, tag or"),
        ("hf-hub:org/broken", "its download from {hub} failed (HfHubHTTPError: Server error '503"),
    ],
)
def test_what_the_hub_refuses_is_one_line(server, name, message, capsys):
    line = error_of("drl_jax.weights.download", name, capsys=capsys)
    assert message.format(hub=server.address) in line
    assert not server.sent


def test_a_repository_without_one_file_of_weights_downloads_nothing(server):
    server.files = {"a.safetensors": b"a", "b.safetensors": b"b", "config.json": b"{}"}
    with pytest.raises(HubError, match="has several files of weights"):
        weights_path(NAME)
    assert not server.sent


def test_the_command_names_the_commit(server, capsys):
    assert download.main([NAME]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(str(server.cache))
    assert printed.endswith(f"; train with --config.model.init={NAME}@{COMMIT}\n")
    assert "--out is for" in error_of("drl_jax.weights.download", NAME, "--out=a", capsys=capsys)


def test_commands_and_the_api_read_a_repository(server, tiny_weights, tmp_path, monkeypatch):
    server.files = {"model.safetensors": tiny_weights.read_bytes()}
    monkeypatch.chdir(tmp_path)
    # A run of this name would need a Path.
    (tmp_path / NAME).mkdir(parents=True)
    with pytest.raises(WeightsError, match=f"{NAME} has no weights: it has no files"):
        weights_path(Path(NAME))
    model = drl_jax.load(NAME)
    assert model.source == {"weights": NAME}
    assert convert([NAME, "run"]) == 0
    assert drl_jax.load("run").config.model == model.config.model
    assert server.sent == [("model.safetensors", COMMIT)]


# ---------------------------------------------------------------- accidents


def start_download(server, prelude: str) -> subprocess.Popen:
    """The command in a process, after some other code."""
    code = (
        f"import sys, resource\n{prelude}\n"
        f"from drl_jax.weights.download import main\nsys.exit(main(['{NAME}']))"
    )
    env = {
        "HF_HOME": str(server.cache.parent),
        "HF_HUB_CACHE": str(server.cache),
        "HF_ENDPOINT": server.address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "",
    }
    return start_interruptible(
        [sys.executable, "-c", code], env={**os.environ, **env}, stderr=subprocess.PIPE
    )


def last_line(process: subprocess.Popen) -> str:
    errors = process.communicate(timeout=60)[1]
    assert "Traceback" not in errors
    return errors.replace("\r", "\n").strip().splitlines()[-1]


def test_a_full_disk_and_an_interrupt_are_one_line_and_the_rest_is_repeated(server):
    """A limit of the size of files fails as a full disk does."""
    blobs = server.cache / "models--org--tiny" / "blobs"
    process = start_download(server, "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))")
    line = last_line(process)
    assert process.returncode == 1
    assert f"{NAME} cannot be stored: {server.cache}: File too large; HF_HOME moves" in line
    assert (blobs / "tokenizer.json").exists()
    assert not (blobs / "model.safetensors").exists()

    server.stalls_at = "model.safetensors"
    process = start_download(server, "")
    assert server.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    line = last_line(process)
    assert process.returncode == 130
    assert line.endswith(
        f" interrupted; complete files of {NAME} stay in {server.cache}; run the command again"
    )
    server.stalls_at = ""
    assert weights_path(NAME).read_bytes() == FILES["model.safetensors"]
    assert [file for file, _ in server.sent].count("config.json") == 1
