"""Builds on a real Ray cluster of two raylets; nodes, workers and drivers are killed."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.commands import ROOT, error_of
from support.datasets import custom
from support.files import contents, small_disk
from support.ray_nodes import ENVIRONMENT, sleep_briefly, two_nodes, work
from support.videos import write_video

import drl_jax
from data_prep.build import main as build
from drl_jax.runtime.cluster import connect
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.node_check import Needs, identity, problem_of_node
from drl_jax.runtime.worker_pool import WorkerFailure

if TYPE_CHECKING:
    from drl_jax.runtime.ray_cluster import RayCluster

pytest.importorskip("ray")
VARIANT = Path("custom") / "128px_12f_raw_shown_time" / "1.0.0"
VIDEOS = 40


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture
def checked(nodes, needed, tmp_path, monkeypatch):
    """The cluster, whose nodes were checked."""
    # Ray adds this process's working directory to the path of the workers.
    monkeypatch.chdir(tmp_path)
    with connect(nodes.address) as cluster:
        cluster.check(*needed)
        yield cluster


@pytest.fixture
def needed(sources, tmp_path):
    return {"--data_dir": tmp_path}, sources / "all.csv", ["numpy"], ["drl_jax"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Videos of noise that take about a tenth of a second each, and one that is none."""
    root = tmp_path_factory.mktemp("sources")
    (root / "videos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (90, 256, 256, 3)).astype(np.uint8)
    write_video(root / "videos" / "0.mp4", noise, fps=10)
    for number in range(1, VIDEOS):
        shutil.copy(root / "videos" / "0.mp4", root / "videos" / f"{number}.mp4")
    (root / "videos" / "7.mp4").write_text("no video")
    rows = "".join(f"{n},number {n},train\n" for n in range(VIDEOS))
    (root / "all.csv").write_text(f"video,caption,split\n{rows}")
    return root


@pytest.fixture(scope="module")
def local(sources, tmp_path_factory) -> Path:
    """The dataset that processes of this machine build."""
    data_dir = tmp_path_factory.mktemp("local")
    assert build(flags(sources, data_dir)) == 0
    return data_dir / VARIANT


def flags(sources: Path, data_dir: Path, *extra: str) -> list[str]:
    return custom(sources, "all.csv", data_dir, "--image_size=128", "--storage=raw", *extra)


def entries(data_dir: Path) -> dict[str, int]:
    """The cached videos and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (data_dir / "cache").rglob("*.npz")}


def test_a_build_that_is_killed_and_then_loses_a_node_has_the_same_bytes(
    nodes, sources, local, tmp_path
):
    kept: dict[str, int] = {}

    def start_and_wait() -> subprocess.Popen:
        arguments = flags(sources, tmp_path, f"--ray={nodes.address}")
        process = subprocess.Popen(
            [sys.executable, "-m", "data_prep.build", *arguments],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
            **{"cwd": ROOT, "env": {**os.environ, **ENVIRONMENT}},
        )
        while len(entries(tmp_path)) < len(kept) + 4:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        return process

    for sent in (signal.SIGTERM, signal.SIGKILL):
        process = start_and_wait()
        process.send_signal(sent)
        _, error = process.communicate()
        assert process.returncode == -sent
        assert "SIGTERM" not in error
        kept = entries(tmp_path)
    assert 8 <= len(kept) < VIDEOS - 1
    process = start_and_wait()
    nodes.kill(nodes.others[0])
    decoded = len(entries(tmp_path))
    out, error = process.communicate(timeout=120)
    nodes.add()
    with connect(nodes.address) as cluster:
        wait_for_nodes(cluster, 2)
    assert process.returncode == 0, error
    assert decoded < VIDEOS - 1
    assert "Ray cluster: 2 nodes, 2 CPUs" in out
    assert "raylet" not in out + error
    assert "Traceback" not in error
    assert entries(tmp_path).items() >= kept.items()
    assert contents(tmp_path / VARIANT) == contents(local)
    # Nothing of the checks is left.
    assert not list((tmp_path / "cache" / "custom").glob(".*"))


def test_a_call_that_hangs_crashes_or_kills_its_worker_fails_alone(checked, tmp_path):
    results = list(checked.map(work, [(number, tmp_path) for number in range(10)], timeout=2))
    died = "the process that worked on it died (exit code -11)"
    assert results[2] == WorkerFailure("the Ray worker that worked on it died", is_passing=True)
    assert results[3] == WorkerFailure(died, is_passing=True)
    late = WorkerFailure("took longer than 2 s", is_passing=True, timed_out=True)
    assert results[5] == late
    assert results[7] == WorkerFailure("ValueError: of call 7")
    assert [results[n] for n in (0, 1, 4, 6, 8, 9)] == [0, 1, 4, 6, 8, 9]


def test_work_in_flight_is_bounded_and_the_rest_is_cancelled(checked, tmp_path):
    results = checked.map(sleep_briefly, [(n, tmp_path) for n in range(100)], ahead=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    time.sleep(2)  # The first, the one that is next, and two for each of two processors.
    assert len([path for path in tmp_path.iterdir() if path.name.isdecimal()]) <= 3 + 2 * 2
    results.close()


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:1", "HTTP"])
def test_an_address_without_ray_is_one_line(address, sources, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer_as_http, args=(server,), daemon=True).start()
        if address == "HTTP":
            address = f"127.0.0.1:{server.getsockname()[1]}"
        arguments = flags(sources, tmp_path, f"--ray={address}")
        line = error_of("data_prep.build", *arguments, capsys=capsys)
    start = f"data_prep.build: --ray={address}: "
    forms = "write local, auto, or HOST:PORT of the head of a Ray cluster"
    if not address:
        assert line == f"data_prep.build: argument --ray: {forms}"
    elif address == "nowhere":
        assert line == f"{start}{forms}"
    else:
        assert line.startswith(f"{start}no Ray cluster is there (")
        assert "start one with `ray start --head`" in line


def answer_as_http(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection, _ = server.accept()
        connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")


def test_another_version_of_ray_is_one_line(nodes, sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ray.__version__", "2.9.0")
    arguments = flags(sources, tmp_path, f"--ray={nodes.address}")
    line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert "Version mismatch: The cluster was started with: Ray: 2." in line
    assert "Ray: 2.9.0" in line
    assert line.endswith(
        "install the same versions of Ray and Python on all nodes and this machine"
    )


def test_without_ray_the_line_says_how_to_install_it(sources, tmp_path):
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from data_prep.build import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *flags(sources, tmp_path, "--ray=local")]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 1
    assert failed.stderr.startswith("data_prep.build: --ray needs Ray (ModuleNotFoundError: ")
    assert failed.stderr.endswith("): pip install 'drl_jax[ray]', on every node\n")


def test_other_versions_on_a_node():
    needs = Needs({"numpy": np.__version__}, {"drl_jax": identity("drl_jax")}, [], None)
    assert problem_of_node(needs) == ""
    numpy, ours = np.__version__, drl_jax.__version__
    for changed, problem in (
        ({"packages": {"numpy": "1.0"}}, f"has numpy {numpy}, not 1.0; install numpy==1.0 there"),
        ({"packages": {"no-such": "1.0"}}, "has no no-such; install no-such==1.0 there"),
        ({"modules": {"drl_jax": ("9", "")}}, f"has drl_jax {ours}, not 9; install 9 there"),
        (
            {"modules": {"no_such": ("1", "")}},
            "cannot import no_such (No module named 'no_such'); install version 1 there",
        ),
    ):
        assert problem_of_node(needs._replace(**changed)) == problem


def test_a_node_with_another_version_of_the_package_is_named(nodes, checked, needed, tmp_path):
    """Also if it joins while a command runs."""
    other = tmp_path / "other"
    shutil.copytree(ROOT / "drl_jax", other / "drl_jax", ignore=lambda *_: ["__pycache__"])
    init = other / "drl_jax" / "__init__.py"
    init.write_text(init.read_text().replace(drl_jax.__version__, "0.0.7"))
    results = checked.map(sleep_briefly, [(n, tmp_path) for n in range(500)])
    assert next(results) == 0
    path = f"{other}:{ROOT / 'tests'}:{ROOT}"
    bad = nodes.add(PYTHONPATH=path)
    try:
        line = rf"^node \S+ \(.*, {bad.id[:8]}\) has drl_jax 0.0.7, not {drl_jax.__version__};"
        with pytest.raises(UserError, match=line):
            list(results)
        with pytest.raises(UserError, match=line):
            checked.check(*needed)
    finally:
        nodes.kill(bad)
    wait_for_nodes(checked, 2)


def test_a_node_that_does_not_see_a_directory_or_has_a_full_disk_is_named(
    nodes, sources, tmp_path, capsys
):
    """The first is a raylet in a mount namespace of its own, with an empty file system there."""
    (tmp_path / "data").mkdir()
    script = (
        f"mount -t tmpfs tmpfs {tmp_path / 'data'} &&"
        f" exec {Path(sys.executable).with_name('ray')} start --address={nodes.address}"
        " --num-cpus=1 --object-store-memory=80000000 --block"
    )
    command = ["unshare", "--mount", "sh", "-c", script]
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed")
    alone = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        with connect(nodes.address) as cluster:
            wait_for_nodes(cluster, 3)
        arguments = flags(sources, tmp_path / "data", f"--ray={nodes.address}")
        line = error_of("data_prep.build", *arguments, capsys=capsys)
    finally:
        os.killpg(alone.pid, signal.SIGKILL)
        alone.wait()
    with connect(nodes.address) as cluster:
        wait_for_nodes(cluster, 2)
    assert re.fullmatch(
        r"data_prep.build: node \S+ \(\S+, \w{8}\) does not see --data_dir, "
        + re.escape(str(tmp_path / "data" / "cache" / "custom"))
        + r" \(No such file or directory\); mount the same file system there, at the same path",
        line,
    )
    with small_disk(tmp_path / "disk", "3m") as disk:
        arguments = flags(sources, disk, f"--ray={nodes.address}")
        line = error_of("data_prep.build", *arguments, capsys=capsys)
    assert re.fullmatch(
        rf"data_prep.build: no space left in {disk} on node \S+ \(\S+, \w{{8}}\);"
        " free disk space, then rerun the command to continue",
        line,
    )


def wait_for_nodes(cluster: "RayCluster", count: int) -> None:
    end = time.monotonic() + 60
    while len(cluster.nodes()) != count:
        assert time.monotonic() < end, "a node has not joined or left"
        time.sleep(0.1)
