"""Indexing on a real Ray cluster of two raylets gives the index of a local run."""

import math
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from support.ray_nodes import two_nodes
from support.videos import numbered_frames, write_video

from drl_jax.data.frame_form import FrameForm
from drl_jax.runtime.cluster import connect
from drl_jax.runtime.node_check import needs_of_driver
from drl_jax.search import update
from drl_jax.search.index_file import open_part
from drl_jax.search.reading import FrameSampling, read_video_on_node
from drl_jax.search.segments import SearchIndexError, VideoRecord
from drl_jax.search.session import Index
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
def cluster(nodes):
    with connect(nodes.address) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def videos(test_videos, tmp_path_factory) -> Path:
    """Short videos in nine batches, two long ones, and one that is none."""
    folder = tmp_path_factory.mktemp("ray_videos")
    for path in test_videos.glob("*.mp4"):
        for copy in range(4):
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
    """Fields, arrays and thumbnails of each video of an index, in the order of its segments."""
    part = open_part(directory)
    assert not any(one.gone.any() for one in part.listed)
    records = [one.segment.read(row) for one in part.listed for row in range(len(one.gone))]
    return [
        (
            record[: VideoRecord._fields.index("arrays")],
            {name: array.tobytes() for name, array in record.arrays.items()},
            [bytes(strip) for strip in record.strips],
        )
        for record in records
    ]


def stored(directory: Path) -> int:
    try:
        return open_part(directory).videos()
    except SearchIndexError:  # Not created yet.
        return 0


def test_an_index_that_loses_processes_and_a_node_is_that_of_a_local_run(
    nodes, cluster, search_model, videos, local, tmp_path, capsys
):
    """Also the segments, and what died with them: frames, batches, and the processes' models."""
    directory, killed_at = tmp_path / "index", []

    def kill() -> None:
        while not stored(directory):
            time.sleep(0.01)
        encoders = [
            pid
            for pid in nodes.head.workers()
            if b"_NodeEncoder" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(*encoders, signal.SIGKILL)
        nodes.kill(nodes.others[0])
        killed_at.append(stored(directory))

    killer = threading.Thread(target=kill)
    killer.start()
    report = update_index(
        search_model, videos, directory, storage="float32", bank=BANK, cluster=cluster
    )
    killer.join()
    assert 0 < killed_at[0] < 131
    assert (report.added, report.bad.keys()) == (131, {"text.mp4"})
    assert content(directory) == content(local)
    assert not list((directory / "spool").glob("*"))
    queries = ["a red circle moves left", "a square"]
    found, expected = (
        [[(hit.path, hit.score) for hit in hits] for hits in Index(d).search(queries, 5)]
        for d in (directory, local)
    )
    assert found == expected
    captured = capsys.readouterr()
    assert "raylet" not in captured.out + captured.err


def test_a_node_without_the_model_says_so(search_model, tmp_path, monkeypatch):
    from drl_jax.search.ray_update import _NodeEncoder

    def load(fingerprint: str, **source: str) -> str:
        needs = needs_of_driver([], [])
        return _NodeEncoder().load(search_model.source | source, fingerprint, {}, tmp_path, needs)

    run = search_model.source["workdir"]
    assert load("other") == f"has another model in {run}; give it the same files"
    line = load(search_model.fingerprint, workdir="/nowhere")
    assert line.startswith("cannot load the model: no run in /nowhere")
    assert load(search_model.fingerprint) == ""


def test_frames_that_a_node_cannot_write_name_the_node(cluster, tmp_path):
    """Of a long video, whose frames wait in a file."""
    write_video(tmp_path / "long.mp4", numbered_frames(60, 64, 64), fps=2)
    cluster.check({"--index": tmp_path}, tmp_path / "long.mp4", ["numpy"], ["drl_jax"])
    sampling = FrameSampling(FrameForm(32), 4, 1.0)
    call = (tmp_path / "long.mp4", frozenset(), sampling, tmp_path / "absent" / "0")
    (result,) = cluster.map(read_video_on_node, [call], timeout=60, keep="frames")
    name = r"No such file or directory on node \S+ \(\S+, \w{8}\)"
    assert re.fullmatch(name, result.strerror)
