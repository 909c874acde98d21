"""A call of a worker pool that hangs or dies fails alone; real processes and signals."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
from multiprocessing import Pipe

import pytest
from support.calls import fail_once, work
from support.commands import ROOT
from support.processes import children_of, is_running, wait_until
from support.videos import numbered_frames, write_video

from data_prep.decode import FrameCache, decode_clips
from data_prep.locations import Clip
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.storage import StorageSpec
from drl_jax.runtime import worker_pool
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes


def test_a_call_that_dies_hangs_or_raises_fails_alone():
    results = list(map_in_processes(work, [(n,) for n in range(14)], timeout=1))
    # What the system refused may pass; what is wrong with the content does not.
    truncated, files, memory, disk = (results.pop() for _ in range(4))
    assert disk == WorkerFailure("OSError: [Errno 5] Input/output error: 'a.mp4'", is_passing=True)
    assert memory == WorkerFailure("MemoryError", is_passing=True)
    assert files.is_passing
    assert files.reason.startswith("a.mp4 cannot be read: Too many open files (EMFILE)")
    assert truncated == WorkerFailure("OSError: image file is truncated")
    lock, unpicklable, raised = results.pop(9), results.pop(8), results.pop(7)
    assert unpicklable == WorkerFailure("Unpicklable: about 8 and 3")
    assert isinstance(lock, WorkerFailure)
    assert "\n" not in lock.reason
    assert raised.reason.startswith("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9 in")
    assert ": unexpected end of data of data" in raised.reason
    assert " ... " in raised.reason  # A long message is shortened in the middle.
    assert len(raised.reason) < 240
    late = WorkerFailure("took longer than 1 s", is_passing=True, timed_out=True)
    assert results.pop(5) == late
    died = "the process that worked on it died (exit code -11)"
    assert results.pop(3) == WorkerFailure(died, is_passing=True)
    assert results == [0, 1, 2, 4, 6]


def test_a_call_that_fails_in_passing_is_repeated_alone(tmp_path):
    calls = [(number, tmp_path) for number in range(12)]
    assert list(map_in_processes(fail_once, calls, timeout=1)) == list(range(12))
    ran = {n: [float(time) for time in (tmp_path / f"{n}").read_text().split()] for n, _ in calls}
    for number in (2, 3, 4):
        start, end = ran.pop(number)
        assert all(other[1] <= start or end <= other[0] for other in ran.values()), number


def test_a_process_that_stops_while_it_sends_its_result_is_killed(monkeypatch):
    monkeypatch.setattr(worker_pool, "_START_SECONDS", 0.2)
    with contextlib.closing(worker_pool.CallPool(1)) as pool:
        (worker,), (reader, writer) = pool._workers, Pipe()
        worker._connection = reader
        monkeypatch.setattr(worker, "kill", writer.close)
        os.write(writer.fileno(), struct.pack("!i", 100) + b"half of it")
        with pytest.raises(OSError, match="end of file"):
            worker._receive(None)


def test_a_file_that_hangs_its_reader_times_out(tmp_path):
    write_video(tmp_path / "good.mp4", numbered_frames(30), fps=10)
    os.mkfifo(tmp_path / "hangs.mp4")  # Opening it blocks inside FFmpeg until there is a writer.
    clips = [Clip(name, tmp_path / f"{name}.mp4", None) for name in ("hangs", "good", "absent")]
    cache = FrameCache(tmp_path / "cache", StorageSpec(FrameForm(32), 4, "raw"))
    hangs, good, absent = decode_clips(clips, cache=cache, timeout=2)
    assert hangs == WorkerFailure("took longer than 2 s", is_passing=True, timed_out=True)
    assert good.shape == (3, 32, 32, 3)
    assert absent.is_passing
    assert "No such file or directory" in absent.reason


# Leaves a generator that waits for calls that hang.
HANGING = """
import signal, sys, time
from drl_jax.runtime.worker_pool import map_in_processes
if __name__ == "__main__":
    # Where the tests run in the background, a shell has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results = map_in_processes(time.sleep, [(seconds,) for seconds in (0, 600, 600)])
    next(results)
    try:
        print("waiting", flush=True)
        {then}
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize(
    ("then", "status"),
    [("results.close()", 0), ("sys.exit(3)", 3), ("1 / 0", 1), ("next(results)", 130)],
)
def test_nothing_waits_for_calls_whose_results_nobody_wants(then, status):
    """Also at exit, where the generator is closed last, and after Ctrl-C."""
    command = [sys.executable, "-c", HANGING.format(then=then)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    try:
        assert parent.stdout.readline() == "waiting\n"
        workers = children_of(parent.pid)
        if status == 130:  # As a terminal sends it.
            os.killpg(parent.pid, signal.SIGINT)
        _, error = parent.communicate(timeout=20)
    finally:
        parent.kill()
        parent.wait()
    assert parent.returncode == status
    assert error.count("Traceback") == (status == 1)
    wait_until(lambda: not any(map(is_running, workers)))


@pytest.mark.parametrize(
    ("work", "count"),
    [
        ("list(map_in_processes(time.sleep, [(600,), (600,)]))", 2),
        ("run_module('http.server', '--bind=127.0.0.1', '0')", 1),
    ],
)
def test_children_do_not_outlive_a_killed_parent(work, count):
    code = (
        "import time\n"
        "from drl_jax.runtime.worker_pool import map_in_processes, run_module\n"
        f"if __name__ == '__main__': {work}\n"
    )
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    try:
        wait_until(lambda: len(children_of(parent.pid)) >= count, parent)
        children = children_of(parent.pid)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(is_running, children)))
