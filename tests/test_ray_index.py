"""Indexing on a real Ray cluster of two raylets gives the index of a local run."""

import math
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from support.commands import ROOT
from support.ray_nodes import two_nodes
from support.videos import numbered_frames, write_video

import drl_jax
from drl_jax.data.frame_form import FrameForm
from drl_jax.runtime.cluster import connect
from drl_jax.runtime.errors import ClusterError
from drl_jax.runtime.worker_pool import WorkerFailure
from drl_jax.search import update
from drl_jax.search.index_file import IndexPart
from drl_jax.search.reading import FrameSampling, read_video_on_node
from drl_jax.search.segments import SearchIndexError, VideoRecord
from drl_jax.search.update import update_index

pytest.importorskip("ray")

BANK = ("a red circle moves left", "a blue square", "two shapes")


@pytest.fixture(scope="module", autouse=True)
def full_batches():
    """Features depend, by rounding, on how many windows are encoded together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "_STORED_EVERY", math.inf)
        yield


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture
def cluster(nodes, tmp_path, monkeypatch):
    # Ray adds this process's working directory to the path of the workers.
    monkeypatch.chdir(tmp_path)
    with connect(nodes.address) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def videos(test_videos, tmp_path_factory) -> Path:
    """Short videos in seven batches, two long ones, and one that is none."""
    folder = tmp_path_factory.mktemp("ray_videos")
    for path in test_videos.glob("*.mp4"):
        for copy in range(3):
            shutil.copy(path, folder / f"{copy}_{path.name}")
    write_video(folder / "0_long.mp4", numbered_frames(60, 64, 64), fps=2)
    write_video(folder / "9_long.mp4", numbered_frames(50, 64, 64), fps=2)
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def local(search_model, videos, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("local") / "index"
    update_index(search_model, videos, directory, storage="float32", bank=BANK)
    return directory


def content(directory: Path) -> list[tuple]:
    """Fields and arrays of each video of an index, in the order of its segments."""
    part = IndexPart(directory)
    assert not any(one.gone.any() for one in part.listed)
    records = [one.segment.read(row) for one in part.listed for row in range(len(one.gone))]
    return [
        (
            record[: VideoRecord._fields.index("arrays")],
            {name: array.tobytes() for name, array in record.arrays.items()},
        )
        for record in records
    ]


def stored(directory: Path) -> int:
    try:
        return IndexPart(directory).videos()
    except SearchIndexError:  # Not created yet.
        return 0


def test_an_index_that_loses_a_worker_and_a_node_is_that_of_a_local_run(
    nodes, cluster, search_model, videos, local, tmp_path, capsys
):
    """Also its segments."""
    directory, killed_at = tmp_path / "index", []

    def kill() -> None:
        busy: list[int] = []
        while not (stored(directory) and busy):
            time.sleep(0.01)
            busy = [pid for pid in nodes.head.workers() if b"_run" in command_of(pid)]
        os.kill(busy[0], signal.SIGKILL)
        nodes.kill(nodes.others[0])
        killed_at.append(stored(directory))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    report = update_index(
        search_model, videos, directory, storage="float32", bank=BANK, cluster=cluster
    )
    assert 0 < killed_at[0] < 99
    assert (report.added, report.bad.keys()) == (99, {"text.mp4"})
    assert content(directory) == content(local)
    assert not (directory / "spool").exists()
    captured = capsys.readouterr()
    assert "raylet" not in captured.out + captured.err


def command_of(pid: int) -> bytes:
    """The command of a process; Ray adds the name of the function that a worker runs."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_frames_that_a_node_cannot_write_name_the_node(cluster, tmp_path):
    """Of a long video, whose frames wait in a file."""
    write_video(tmp_path / "long.mp4", numbered_frames(60, 64, 64), fps=2)
    cluster.check({"--index": tmp_path}, tmp_path / "long.mp4", ["numpy"], ["drl_jax"])
    spool = tmp_path / "absent" / "0"
    call = (tmp_path / "long.mp4", frozenset(), FrameSampling(FrameForm(32), 4, 1.0), spool)
    (result,) = cluster.map(read_video_on_node, [call], timeout=60)
    node = f"(on node {socket.gethostname()})"
    reason = f"{spool} cannot be written: No such file or directory (ENOENT) {node}"
    assert result == WorkerFailure(reason, is_passing=True)


def test_a_node_that_cannot_do_the_work_is_one_line(nodes, cluster, search_model, videos, tmp_path):
    shutil.copytree(ROOT / "drl_jax", tmp_path / "other" / "drl_jax")
    init = tmp_path / "other" / "drl_jax" / "__init__.py"
    init.write_text(init.read_text().replace(drl_jax.__version__, "0.0.7"))
    bad = nodes.add(PYTHONPATH=f"{tmp_path / 'other'}:{ROOT / 'tests'}:{ROOT}")
    try:
        while bad.id not in cluster.nodes():
            time.sleep(0.1)
        line = rf"^node \S+ \(.*, {bad.id[:8]}\) has drl_jax 0.0.7, not {drl_jax.__version__};"
        with pytest.raises(ClusterError, match=line):
            update_index(search_model, videos, tmp_path / "index", cluster=cluster)
    finally:
        nodes.kill(bad)
