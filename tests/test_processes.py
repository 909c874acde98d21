"""A call of a worker pool that hangs or dies fails alone; real processes and signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from support.commands import ROOT
from support.videos import numbered_frames, write_video

from data_prep.decode import decode_clips
from data_prep.frame_cache import FrameCache
from data_prep.locations import Clip
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.storage import StorageSpec
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes


def work(number: int) -> int:
    """Dies for 3, hangs for 5, raises for 7 and 8, returns nonsense for 9.

    Workers import this module, so its imports are light.
    """
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 5:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        time.sleep(600)
    if number == 7:
        raise UnicodeDecodeError("utf-8", b"Caf\xe9", 3, 4, "unexpected\nend " + "of data " * 100)
    if number == 8:
        raise Unpicklable(number, 3)
    if number == 9:
        return threading.Lock()  # A result that cannot be sent.
    return number


class Unpicklable(Exception):
    """An exception that can be sent to another process, but not be received there."""

    def __init__(self, number: int, other: int):
        super().__init__(f"about {number} and {other}")


def test_a_call_that_dies_hangs_or_raises_fails_alone():
    results = list(map_in_processes(work, [(n,) for n in range(11)], timeout=2))
    lock, unpicklable, raised = results.pop(9), results.pop(8), results.pop(7)
    assert unpicklable == WorkerFailure("Unpicklable: about 8 and 3")
    assert isinstance(lock, WorkerFailure)
    assert "\n" not in lock.reason
    assert raised.reason.startswith("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9 in")
    assert ": unexpected end of data of data" in raised.reason
    assert " ... " in raised.reason  # A long message is shortened in the middle.
    assert len(raised.reason) < 240
    assert results.pop(5) == WorkerFailure("took longer than 2 s", timed_out=True)
    assert results.pop(3) == WorkerFailure("the process that worked on it died (exit code -11)")
    assert results == [0, 1, 2, 4, 6, 10]


def test_a_file_that_hangs_its_reader_times_out(tmp_path):
    write_video(tmp_path / "good.mp4", numbered_frames(30), fps=10)
    os.mkfifo(tmp_path / "hangs.mp4")  # Opening it blocks inside FFmpeg until there is a writer.
    clips = [Clip(name, tmp_path / f"{name}.mp4", None) for name in ("hangs", "good", "absent")]
    cache = FrameCache(tmp_path / "cache", StorageSpec(FrameForm(32), 4, "raw"))
    hangs, good, absent = decode_clips(clips, cache=cache, timeout=2)
    assert (hangs.frames, hangs.error) == (None, "took longer than 2 s")
    assert good.frames.shape == (3, 32, 32, 3)
    assert (absent.frames, absent.error) == (None, "cannot be opened")


def test_workers_do_not_outlive_a_killed_parent():
    code = (
        "import time\n"
        "from drl_jax.runtime.worker_pool import map_in_processes\n"
        "if __name__ == '__main__':\n"
        "    list(map_in_processes(time.sleep, [(600,), (600,)]))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_until(lambda: len(children_of(parent.pid)) >= 2)
        workers = children_of(parent.pid)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(is_running, workers)))


def status(pid: int) -> tuple[str, int] | None:
    """State and parent of a process; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[1])


def children_of(pid: int) -> list[int]:
    running = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [child for child in running if (status(child) or ("", 0))[1] == pid]


def is_running(pid: int) -> bool:
    found = status(pid)
    return found is not None and found[0] != "Z"


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
