"""Indexing on a real Ray cluster of two raylets gives the index of a local run."""

import dataclasses
import math
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ray_nodes import two_nodes
from support.videos import numbered_frames, write_video

from drl_jax.data.batches import load_split
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.runs.stored_features import stored_features
from drl_jax.runtime.cluster import connect
from drl_jax.runtime.sharding import make_layout
from drl_jax.runtime.worker_pool import WorkerFailure
from drl_jax.search import update
from drl_jax.search.index_file import IndexPart
from drl_jax.search.reading import FrameSampling, read_video_on_node
from drl_jax.search.segments import SearchIndexError
from drl_jax.search.update import update_index
from drl_jax.weights.load import initial_params
from drl_jax.weights.weights_file import read_weights

pytest.importorskip("ray")


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


def content(directory: Path) -> list[tuple]:
    """Fields and arrays of each video of an index, in the order of its segments."""
    part = IndexPart(directory)
    assert not any(one.gone.any() for one in part.listed)
    records = [one.segment.read(row) for one in part.listed for row in range(len(one.gone))]
    return [
        (*record[:7], {name: array.tobytes() for name, array in record.arrays.items()})
        for record in records
    ]


def stored(directory: Path) -> int:
    try:
        return IndexPart(directory).videos()
    except SearchIndexError:  # Not created yet.
        return 0


def command_of(pid: int) -> bytes:
    """The command of a process; Ray adds the name of the function that a worker runs."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_an_index_that_loses_a_worker_and_a_node_is_that_of_a_local_run(
    nodes, cluster, search_model, test_videos, tmp_path, capsys, monkeypatch
):
    """Also its segments: features depend, by rounding, on how many windows are encoded together."""
    monkeypatch.setattr(update, "_STORED_EVERY", math.inf)
    (videos := tmp_path / "videos").mkdir()
    for path in test_videos.glob("*.mp4"):
        for copy in range(3):
            shutil.copy(path, videos / f"{copy}_{path.name}")
    for name, count in (("0_long.mp4", 60), ("9_long.mp4", 50)):
        write_video(videos / name, numbered_frames(count, 64, 64), fps=2)
    (videos / "text.mp4").write_text("no video")
    directory, killed_at = tmp_path / "index", []

    def kill() -> None:
        busy: list[int] = []
        while not (stored(directory) and busy):
            time.sleep(0.01)
            busy = [pid for pid in nodes.head.workers() if b"_run" in command_of(pid)]
        os.kill(busy[0], signal.SIGKILL)
        nodes.kill(nodes.others[0])
        killed_at.append(stored(directory))

    def index(directory, cluster=None):
        bank = ("a red circle moves left", "a blue square", "two shapes")
        return update_index(
            search_model, videos, directory, storage="float32", bank=bank, cluster=cluster
        )

    threading.Thread(target=kill, daemon=True).start()
    report = index(directory, cluster)
    captured = capsys.readouterr()
    assert "raylet" not in captured.out + captured.err
    assert 0 < killed_at[0] < 99
    assert (report.added, report.bad.keys()) == (98, {"text.mp4"})
    assert not (directory / "spool").exists()
    index(tmp_path / "local")
    assert content(directory) == content(tmp_path / "local")


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


def test_stored_features_are_those_of_a_local_run(
    nodes, shapes_config, tiny_weights, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    weights = read_weights(str(tiny_weights))
    model = dataclasses.replace(weights.config.model, init=str(tiny_weights))
    config = dataclasses.replace(shapes_config, model=model)
    dataset = VideoDataset(dataset_dir(config))
    splits = [load_split(dataset, name, config.data) for name in ("train", "val", "test")]
    params = initial_params(model, weights, jax.random.key(0))
    # As many devices as a worker has, which decide the shapes of batches.
    layout = make_layout(jax.devices()[:1])

    def parts(name, ray):
        data = dataclasses.replace(config.data, features=str(tmp_path / name))
        here = dataclasses.replace(config, data=data)
        stored_features(here, dataset, splits, params, layout, ray=ray)
        paths = sorted((tmp_path / name).glob("*.npy"))
        return {path.name: np.load(path).view(jnp.bfloat16).astype(np.float32) for path in paths}

    found, expected = parts("ray", nodes.address), parts("local", "")
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        np.testing.assert_allclose(found[name], rows, rtol=1e-2, atol=1e-2)
