"""Training over two real processes: the same numbers, one writer, and mistakes that end."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess

import jax
import numpy as np
import pytest
from support.commands import error_line, error_of, start_module, wait_for
from support.files import enlarge, flip_largest, small_disk
from support.finished_runs import metrics
from support.pairs import free_port, start_pair
from support.processes import wait_until

from drl_jax.runs.run_params import restore_params
from drl_jax.runs.workdir import load_config
from drl_jax.runtime import distributed
from drl_jax.runtime.distributed import StopPoll
from drl_jax.runtime.sharding import make_layout
from drl_jax.train import main as train

# What gloo prints on stdout, whatever we do.
GLOO_LINE = "Gloo Rank is connected to peer ranks Expected number of connected peer ranks is"


@pytest.fixture(scope="module")
def arguments(tiny_arguments):
    """Makes the arguments of a tiny run in a directory."""
    # With larger updates, 12 steps amplify the rounding of sums in another order to 1e-3 of the
    # gradient norm.
    return lambda workdir, *extra: tiny_arguments(workdir, "--config.optim.lr=1e-4", *extra)


def params_of(workdir):
    return restore_params(workdir, load_config(workdir).model, make_layout(), "latest")


@pytest.mark.slow
def test_two_processes_stop_and_fall_back_together_and_match_one(arguments, tmp_path):
    """A signal reaches one of them, and then one of them reads a damaged file."""
    if os.geteuid():
        pytest.skip("cannot mount")
    alone, workdir = tmp_path / "alone", tmp_path / "two"
    often = "--config.train.checkpoint_every=3"
    assert train(arguments(alone, often)) == 0
    flags = arguments(workdir, often)
    pair = start_pair(flags)
    wait_until((workdir / "checkpoints" / "3").exists, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    for process in pair:
        _, errors = wait_for(process)
        assert process.returncode == 75, errors
        assert "rerun the command to resume" in errors
        assert "Traceback" not in errors
    assert not (workdir / "result.json").exists()

    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    previous, latest = steps[-2:]
    params, changed = workdir / "checkpoints" / str(latest) / "params", tmp_path / "changed"
    shutil.copytree(params, changed)
    changed = flip_largest(changed)
    (path,) = params.rglob(changed.name)
    # Only process 1 sees the other file.
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", script, "sh", str(changed), str(path))
    pair = start_pair(flags, prefix_of_second=prefix)
    (main_output, main_errors), (other_output, other_errors) = map(wait_for, pair)
    assert [process.returncode for process in pair] == [0, 0], (main_errors, other_errors)
    # The changed bit is in a number, or in what compresses it.
    damage = rf"checkpoint {latest} is damaged: .*params.* \(process 1\); moved to"
    assert re.search(damage, main_output), main_output
    assert f"resuming {workdir} from step {previous} of 12" in main_output
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


def test_two_processes_end_together(arguments, tmp_path, capsys):
    """On a full disk, which one of them notices; with more space, the same command goes on."""
    run = tmp_path / "disk" / "run"
    flags = arguments(run, "--config.train.keep_checkpoints=9")
    with small_disk(tmp_path / "disk", "5m") as disk:
        pair = start_pair(flags)
        for process in pair:
            _, errors = wait_for(process)
            assert process.returncode == 1
            assert "Traceback" not in errors
            assert "No space left on device" in errors.strip().splitlines()[-1]
        enlarge(disk, "100m")
        assert train(flags) == 0
        assert f"resuming {run} from step 6" in capsys.readouterr().out


def test_a_cluster_that_is_not_complete_ends_in_one_line(arguments, tmp_path):
    flags = arguments(tmp_path / "run")
    manual = ("--distributed=manual", "--num_processes=2", "--init_timeout=1")

    def start(*extra):
        return start_module("drl_jax.train", *flags, *extra)

    def coordinator():
        return f"--coordinator=localhost:{free_port()}"

    cases = (
        (
            start(*manual, coordinator(), "--process_id=0"),
            r"not all 2 processes connected to localhost:\d+ within 1 s",
        ),
        (
            start(*manual, coordinator(), "--process_id=1"),
            r"process 0 does not answer on --coordinator=localhost:\d+",
        ),
        (start("--distributed=auto"), "the processes of the run cannot be joined"),
    )
    for process, message in cases:
        printed = wait_for(process)
        finished = subprocess.CompletedProcess(process.args, process.returncode, *printed)
        assert re.search(message, error_line(finished))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed=manual"], "needs --coordinator too"),
        (["--num_processes=2"], "--num_processes goes with --distributed=manual"),
        (["--local_device_ids=0"], "--local_device_ids goes with --distributed=auto or manual"),
        (["manual", "--coordinator=nowhere", "--process_id=0"], "is HOST:PORT, not 'nowhere'"),
        (["manual", "--coordinator=localhost:1", "--process_id=2"], "is not one of 0 to 1"),
        (["manual", "--coordinator=no.invalid:99", "--process_id=1"], "no.invalid:99"),
    ],
)
def test_wrong_flags_are_one_line(arguments, tmp_path, flags, message, capsys):
    if flags[0] == "manual":
        flags = ["--distributed=manual", "--num_processes=2", *flags[1:]]
    command = ("drl_jax.train", *arguments(tmp_path / "run"), *flags)
    assert message in error_of(*command, capsys=capsys)
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


def test_one_process_stops_after_the_step_that_it_is_in():
    pending = False
    poll = StopPoll(lambda: pending)
    assert not poll(1)
    pending = True
    assert poll(2)


def test_processes_poll_after_the_same_steps(monkeypatch):
    """Two processes, one of them slower; a signal reaches one of them."""
    clock = 0.0
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock)
    polls = []

    def process_allgather(own):
        polls.append(step)
        return np.stack([own, [step > 12, 0.5]])

    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", process_allgather)
    poll = StopPoll(lambda: False, seconds=5.0)
    for step in range(1, 30):
        clock += 0.25
        if poll(step):
            break
    # The slower process takes 0.5 s a step: intervals double up to 10 steps, 5 s.
    assert polls == [1, 3, 7, 15]
    assert step == 15
