"""Limits of processors and memory, atomic files, the command-line layer, interruptions."""

import errno
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
from support.commands import ROOT, start_interruptible

from drl_jax.runtime import resources
from drl_jax.runtime.distributed import StopPoll
from drl_jax.runtime.errors import Unavailable, raise_if_refused, refusal
from drl_jax.runtime.files import copy_once, naming, replacing, write_text


def test_failed_tasks_that_are_left_behind_print_nothing():
    """Orbax leaves some when a disk is full; the error itself is one line."""
    code = (
        "import asyncio\n"
        "from drl_jax.runtime.cli import run_command\n"
        "from drl_jax.runtime.errors import UserError\n"
        "async def fail():\n"
        "    raise ValueError('abandoned')\n"
        "async def main():\n"
        "    asyncio.ensure_future(fail())\n"
        "    await asyncio.sleep(0)\n"
        "def work():\n"
        "    asyncio.run(main())\n"
        "    raise UserError('the disk is full')\n"
        "print(run_command('command', work))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (finished.stdout, finished.stderr) == ("1\n", "command: the disk is full\n")


def test_processors_are_those_of_the_affinity_mask():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert resources.available_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A machine with 64 processors and 100 GB, and a directory for the files of a cgroup."""
    cgroup = tmp_path / "cgroup" / "job"
    cgroup.mkdir(parents=True)
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemAvailable: 100000000 kB\n")
    (tmp_path / "own").write_text("0::/job\n")
    monkeypatch.setattr(resources, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(resources, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    return cgroup


def test_limits_of_cgroup_version_2(cgroups):
    assert resources.available_cpus() == 64
    assert resources.available_memory() == 100_000_000 * 1024
    (cgroups / "cpu.max").write_text("max 100000\n")
    assert resources.available_cpus() == 64
    (cgroups / "cpu.max").write_text("250000 100000\n")
    (cgroups / "memory.max").write_text(f"{8 * 2**30}\n")
    (cgroups / "memory.current").write_text(f"{5 * 2**30}\n")
    (cgroups / "memory.stat").write_text(f"anon 1\ninactive_file {2**30}\n")
    assert resources.available_cpus() == 3
    assert resources.available_memory() == 4 * 2**30
    # The parent may be stricter.
    (cgroups.parent / "cpu.max").write_text("100000 100000\n")
    assert resources.available_cpus() == 1


def test_limits_of_cgroup_version_1(cgroups, tmp_path):
    (tmp_path / "own").write_text("3:cpu:/job\n2:memory:/job\n")
    for controller in ("cpu", "memory"):
        (tmp_path / "cgroup" / controller / "job").mkdir(parents=True)
    (tmp_path / "cgroup" / "cpu" / "job" / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cgroup" / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cgroup" / "memory" / "job" / "memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "cgroup" / "memory" / "job" / "memory.usage_in_bytes").write_text("400\n")
    assert resources.available_cpus() == 2
    assert resources.available_memory() == 600


def test_memory_is_limited_in_a_block():
    code = (
        "from drl_jax.runtime.resources import memory_limit\n"
        "before = bytearray(200_000_000)\n"
        "with memory_limit(100_000_000):\n"
        "    inside = bytearray(50_000_000)\n"
        "    try:\n"
        "        bytearray(100_000_000)\n"
        "    except MemoryError:\n"
        "        print('limited')\n"
        "after = bytearray(200_000_000)\n"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == "limited\n"


def test_files_are_replaced_atomically(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "first")

    def interrupted():
        with replacing(path) as unfinished:
            unfinished.write_text("second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "moved_away" / "file.txt", "first")
    assert list(tmp_path.iterdir()) == [path]


def test_a_pipe_that_is_closed_early_ends_a_command_without_a_word():
    code = (
        "import sys\n"
        "from drl_jax.runtime.cli import run_command\n"
        "sys.exit(run_command('test', lambda: print('line\\n' * 100_000)))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


# Where Ctrl-C comes in the middle of something; all of them clean up after it for a while.
WORK = {
    "waiting": "ready(); time.sleep(60)",
    # Python drops what is raised there, and says so.
    "in a callback": """
class Callback:
    def __del__(self):
        ready()
        time.sleep(1)
callback = Callback()
del callback
time.sleep(60)
""",
    # Extension modules print it, or go on.
    "in an import": """
ready()
import slow
time.sleep(60)
""",
    "a library's error": """
ready()
try:
    time.sleep(60)
except KeyboardInterrupt as error:
    raise RuntimeError("in a library") from error
""",
    "a crash at the end of Python": """
class Crash:
    def __del__(self, abort=os.abort):
        abort()
crash = Crash()
ready()
time.sleep(60)
""",
    "a job that stops at a safe point": """
with StopRequest():
    ready()
    time.sleep(60)
""",
}
COMMAND = """
import os, sys, time
from drl_jax.runtime.cli import run_command
from drl_jax.runtime.signals import StopRequest
def ready():
    print("ready", flush=True)
def work():
    try:
        exec(compile(sys.argv[1], "work", "exec"), globals())
    finally:
        time.sleep(float(sys.argv[2]))
        print("cleaned up", flush=True)
sys.exit(run_command("command", work, on_interrupt="all is kept"))
"""


def interrupted(work: str, cleaning: float, gaps: list[float], folder) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command, after a Ctrl-C and others some seconds later."""
    (folder / "slow.py").write_text(
        "import time\ntry:\n    time.sleep(0.6)\nexcept BaseException as error:\n    print(error)\n"
    )
    process = start_interruptible(
        [sys.executable, "-c", COMMAND, work, str(cleaning)],
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "ready\n"
    for seconds in (0.1, *gaps):
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.mark.parametrize("where", WORK)
def test_three_interruptions_are_one(where, tmp_path):
    status, output, errors = interrupted(WORK[where], 0.5, [0.15, 0.15], tmp_path)
    assert (status, output) == (130, "cleaned up\n")
    lines = errors.splitlines()
    assert lines.pop() == "command: interrupted; all is kept"
    if where == "a job that stops at a safe point":
        assert lines.pop().startswith("SIGINT: stopping after the next checkpoint or test")
    assert lines in ([], [""])


def test_a_late_interruption_ends_a_command_that_cleans_up(tmp_path):
    assert interrupted(WORK["waiting"], 60, [0.2, 1.1], tmp_path) == (
        *(130, "", "command: interrupted; all is kept\n"),
    )


def test_commands_answer_help_without_importing_jax():
    """`--help` is answered at once: jax, NumPy and TFDS are imported by the work itself."""
    heavy = (
        "jax flax numpy tensorflow_datasets orbax av grain PIL matplotlib starlette huggingface_hub"
    )
    code = (
        "import sys\n"
        f"for name in {heavy.split()}: sys.modules[name] = None\n"
        "import drl_jax.train, drl_jax.evaluate, drl_jax.compare, drl_jax.convert\n"
        "import drl_jax.search.__main__\n"
        "import data_prep.build, data_prep.check, drl_jax.weights.download\n"
        "for module in (drl_jax.train, drl_jax.evaluate, drl_jax.compare, drl_jax.convert,\n"
        "               drl_jax.search.__main__, data_prep.build, data_prep.check,\n"
        "               drl_jax.weights.download):\n"
        "    try:\n"
        "        module.main(['--help'])\n"
        "    except SystemExit as error:\n"
        "        assert error.code == 0\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    commands = ("train", "evaluate", "convert", "search", "build", "check", "compare", "download")
    for command in commands:
        assert f".{command}" in finished.stdout
    assert finished.stdout.count("usage: python -m ") == 8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_freed_memory_is_kept():
    """A block of 64 MB that is allocated again has its pages already."""
    code = (
        "import resource, sys\n"
        "import numpy as np\n"
        "from drl_jax.runtime.resources import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    np.ones(8_000_000)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "if sys.argv[1:]: keep_freed_memory()\n"
        "faults()\n"
        "print(faults())"
    )

    def faults(*arguments):
        command = [sys.executable, "-c", code, *arguments]
        # With huge pages, an allocation has few faults in both cases.
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0"}
        return int(subprocess.run(command, check=True, capture_output=True, env=env).stdout)

    assert faults("keep") < 100 < faults() / 10


def test_evaluation_and_the_api_import_no_optional_package():
    code = (
        "import sys, drl_jax; drl_jax.load\n"
        "import drl_jax.runs.evaluate_run, drl_jax.data.batches\n"
        "bad = {'tensorflow', 'torch', 'clu', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_one_process_stops_after_the_step_that_it_is_in():
    pending = False
    poll = StopPoll(lambda: pending)
    assert not poll(1)
    pending = True
    assert poll(2)


def test_processes_poll_after_the_same_steps(monkeypatch):
    """Two processes, one of them slower; a signal reaches one of them."""
    from drl_jax.runtime import distributed

    clock = 0.0
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock)
    other_pending = False
    polls = []

    def process_allgather(own):
        polls.append(step)
        return distributed.np.stack([own, [other_pending, 0.5]])

    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", process_allgather)
    poll = StopPoll(lambda: False, seconds=5.0)
    for step in range(1, 30):
        clock += 0.25
        other_pending = step > 12
        if poll(step):
            break
    # The slower process takes 0.5 s a step: intervals double up to 10 steps, 5 s.
    assert polls == [1, 3, 7, 15]
    assert step == 15


# ---------------------------------------------------------------- failures of files


def caused(error: Exception, cause: Exception | None, context: Exception | None = None):
    error.__cause__, error.__context__ = cause, context
    error.__suppress_context__ = cause is not None
    return error


EIO = OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (EIO, errno.EIO),
        (MemoryError(), errno.ENOMEM),
        (TimeoutError(), errno.ETIMEDOUT),
        (caused(ValueError("not JSON"), EIO), errno.EIO),
        (caused(ValueError("not JSON"), None, EIO), errno.EIO),
        # What TensorStore 0.1.86 and array_record 0.8 raise.
        (ValueError("UNKNOWN: Error [tensorstore_spec='{}'] [os_error_code='24']"), errno.EMFILE),
        (RuntimeError("read() failed: Input/output error; reading x; at byte 0"), errno.EIO),
        (ValueError("Input/output error is a caption"), None),
        (ValueError("NOT_FOUND: Error [os_error_code='2']"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), None),
        # Of an offset in a damaged file.
        (OSError(errno.EINVAL, "Invalid argument"), None),
        # PyArrow raises these for damaged files.
        (OSError("Expected to read 8 bytes"), None),
        (ValueError("not JSON"), None),
    ],
)
def test_a_refusal_of_the_operating_system_is_no_damage(error, number):
    found = refusal(error)
    assert (found and found.errno) == number
    if number is None:
        raise_if_refused("x.json", error)
        return
    with pytest.raises(Unavailable, match=r"x.json cannot be read: .*nothing was moved or deleted"):
        raise_if_refused("x.json", error)


def test_an_error_that_was_dealt_with_is_no_refusal():
    error = caused(ValueError("not JSON"), None, EIO)
    error.__suppress_context__ = True  # raise ... from None
    assert refusal(error) is None


def test_an_error_of_writing_names_the_file(tmp_path):
    """`write` itself names none, and a copy names its source."""
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match=r"No space left") as error, naming(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(path)
    with pytest.raises(OSError, match=r"No space left") as error, replacing(path) as unfinished:
        raise OSError(errno.ENOSPC, "No space left on device", "source", None, str(unfinished))
    assert str(error.value).endswith(f"'{path}'")
    with pytest.raises(FileNotFoundError) as error:
        copy_once(tmp_path / "source", path)
    assert error.value.filename == str(tmp_path / "source")
    assert not list(tmp_path.iterdir())


def test_writers_with_the_same_process_id_do_not_share_a_temporary_file(tmp_path):
    """As in two containers; in one process here."""
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
