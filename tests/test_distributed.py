"""Training over two real processes: the same numbers, one writer, and mistakes that end."""

import functools
import json
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest
from support.commands import TINY, error_line, error_of, run_module
from support.finished_runs import metrics
from support.pairs import free_port, start_pair, wait_for

from drl_jax.runs.run_params import restore_params
from drl_jax.runs.workdir import load_config
from drl_jax.runtime.sharding import make_layout

# What gloo prints on stdout, whatever we do.
GLOO_LINE = "Gloo Rank is connected to peer ranks Expected number of connected peer ranks is"


@pytest.fixture(scope="module")
def arguments(shapes_data, tiny_weights):
    """Makes the arguments of a tiny run in a directory."""

    def make(workdir):
        return (
            "--config=configs/shapes.py:smoke",
            f"--workdir={workdir}",
            f"--config.data.data_dir={shapes_data}",
            *TINY,
            f"--config.model.init={tiny_weights}",
            # With larger updates, 12 steps amplify the rounding of sums in another order to 1e-3 of
            # the gradient norm.
            "--config.optim.lr=1e-4",
        )

    return make


def params_of(workdir):
    return restore_params(workdir, load_config(workdir).model, make_layout(), "latest")


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """A run in one process of four devices."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    run_module("drl_jax.train", *arguments(workdir), env={"JAX_NUM_CPU_DEVICES": "4"})
    return workdir


@pytest.mark.slow
def test_two_processes_stop_together_and_match_one_process(alone, arguments, tmp_path):
    """Interrupted once (the signal reaches one of the two), resumed, equal to the end."""
    workdir = tmp_path / "two"
    pair = start_pair(arguments(workdir))
    deadline = time.monotonic() + 300
    while not (workdir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert all(process.poll() is None for process in pair), pair[0].communicate()
        time.sleep(0.02)
    pair[1].send_signal(signal.SIGTERM)
    for process in pair:
        _, errors = wait_for(process)
        assert process.returncode == 75, errors
        assert "rerun the command to resume" in errors
        assert "Traceback" not in errors
    assert not (workdir / "result.json").exists()

    pair = start_pair(arguments(workdir))
    (main_output, main_errors), (other_output, other_errors) = map(wait_for, pair)
    assert [process.returncode for process in pair] == [0, 0], (main_errors, other_errors)
    assert "resuming" in main_output
    assert "4 cpu device(s), 2 process(es)" in main_output
    # The other process prints nothing except gloo's messages.
    said = set(re.findall("[A-Za-z]+", other_output))
    assert said <= set(GLOO_LINE.split()), other_output
    assert len(list(workdir.glob("events*"))) == 2  # of the main process, before and after

    found, expected = metrics(workdir), metrics(alone)
    # Where two frames match a token equally well, rounding chooses which one has the gradient.
    for line, expected_line in zip(found, expected, strict=True):
        assert line.keys() == expected_line.keys()
        for tag in [tag for tag in line if re.match("train/(grad|update)_norm", tag)]:
            assert line.pop(tag) == pytest.approx(expected_line.pop(tag), rel=1e-3)
    assert found == [pytest.approx(line, rel=1e-5) for line in expected]
    (step, params), (expected_step, expected_params) = params_of(workdir), params_of(alone)
    assert step == expected_step == 12
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected_params):
        name = jax.tree_util.keystr(path)
        difference = np.abs(functools.reduce(lambda tree, key: tree[key.key], path, params) - leaf)
        # The softmax cancels the bias of the keys: its gradient is rounding error, which Adam
        # amplifies.
        bound = 1e-3 if "['in_proj']['bias']" in name else 1e-5
        assert difference.max() < bound * max(np.abs(leaf).max(), 1e-2), name
    results = [json.loads((run / "result.json").read_text()) for run in (workdir, alone)]
    for result in results:  # The parameters differ by rounding.
        result["card"].pop("parameters_sha256")
    assert results[0] == results[1]


@pytest.mark.parametrize("process", [0, 1])
def test_a_missing_peer_ends_in_one_line(arguments, tmp_path, process):
    started = time.monotonic()
    finished = run_module(
        "drl_jax.train",
        *arguments(tmp_path / "run"),
        "--distributed=manual",
        f"--coordinator=localhost:{free_port()}",
        "--num_processes=2",
        f"--process_id={process}",
        "--init_timeout=3",
        check=False,
    )
    message = {
        0: r"not all 2 processes connected to localhost:\d+ within 3 s",
        1: r"process 0 does not answer on --coordinator=localhost:\d+",
    }
    assert re.search(message[process], error_line(finished))
    assert time.monotonic() - started < 60
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed=manual"], "needs --coordinator too"),
        (["--num_processes=2"], "--num_processes goes with --distributed=manual"),
        (["--local_device_ids=0"], "--local_device_ids goes with --distributed=auto or manual"),
        (["--distributed=auto"], "the processes of the run cannot be joined"),
        (["--distributed=some"], "--distributed"),
        (["manual", "--coordinator=nowhere", "--process_id=0"], "is HOST:PORT, not 'nowhere'"),
        (["manual", "--coordinator=localhost:1", "--process_id=2"], "is not one of 0 to 1"),
        (["manual", "--coordinator=no.invalid:99", "--process_id=1"], "no.invalid:99"),
    ],
)
def test_wrong_flags_are_one_line(arguments, tmp_path, flags, message, capsys):
    if flags[0] == "manual":
        flags = ["--distributed=manual", "--num_processes=2", *flags[1:]]
    command = ("drl_jax.train", *arguments(tmp_path / "run"), *flags)
    if flags == ["--distributed=auto"]:
        # In a process: JAX may be initialised once, before anything runs.
        line = error_line(run_module(*command, check=False))
    else:
        line = error_of(*command, capsys=capsys)
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken(arguments, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = error_of(
            "drl_jax.train",
            *arguments(tmp_path / "run"),
            *("--distributed=manual", f"--coordinator=localhost:{port}", "--num_processes=2"),
            "--process_id=0",
            capsys=capsys,
        )
    assert f"port {port} of --coordinator=localhost:{port} is taken here" in line
