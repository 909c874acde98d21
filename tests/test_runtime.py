"""Limits of processors and memory, atomic files, the command-line layer, interruptions."""

import errno
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support.commands import ROOT, start_interruptible

from drl_jax.runtime import resources
from drl_jax.runtime.errors import Unavailable, raise_if_refused, refusal
from drl_jax.runtime.files import copy_once, naming, replacing, write_text


def run_python(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    command, env = [sys.executable, "-c", code, *arguments], {**os.environ, **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)


# ---------------------------------------------------------------- resources


def test_processors_are_those_of_the_affinity_mask():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert resources.available_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.fixture
def cgroups(tmp_path, monkeypatch) -> Path:
    """A machine with 64 processors and 100 GB; the directory of its cgroups, without limits."""
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemAvailable: 100000000 kB\n")
    monkeypatch.setattr(resources, "_CGROUPS", tmp_path)
    monkeypatch.setattr(resources, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(resources, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    return tmp_path


def write_files(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")


def test_limits_of_cgroup_version_2(cgroups):
    write_files(cgroups, own="0::/job")
    write_files(cgroups / "job", cpu__max="max 100000")
    assert resources.available_cpus() == 64
    assert resources.available_memory() == 100_000_000 * 1024
    stat = f"anon 1\ninactive_file {2**30}"
    write_files(cgroups / "job", cpu__max="250000 100000", memory__stat=stat)
    write_files(cgroups / "job", memory__max=8 * 2**30, memory__current=5 * 2**30)
    assert resources.available_cpus() == 3
    assert resources.available_memory() == 4 * 2**30
    # The parent may be stricter.
    write_files(cgroups, cpu__max="100000 100000")
    assert resources.available_cpus() == 1


def test_limits_of_cgroup_version_1(cgroups):
    write_files(cgroups, own="3:cpu:/job\n2:memory:/job")
    write_files(cgroups / "cpu" / "job", cpu__cfs_quota_us=200000, cpu__cfs_period_us=100000)
    memory = cgroups / "memory" / "job"
    write_files(memory, memory__limit_in_bytes=1000, memory__usage_in_bytes=400)
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
    assert run_python(code).stdout == "limited\n"


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
        # With huge pages, an allocation has few faults in both cases.
        env = {"JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0"}
        return int(run_python(code, *arguments, **env).stdout)

    assert faults("keep") < 100 < faults() / 10


def test_compiled_programs_are_cached_for_later_processes(monkeypatch, tmp_path):
    """In the user's cache directory; an empty JAX_COMPILATION_CACHE_DIR turns the cache off."""
    directory = Path(os.environ["XDG_CACHE_HOME"], "drl_jax", "xla")
    assert jax.config.jax_compilation_cache_dir == str(directory)
    before = set(directory.iterdir())
    jax.jit(lambda x: x @ x + time.time())(jnp.ones((3, 3)))
    assert any(path.name.startswith("jit__lambda") for path in set(directory.iterdir()) - before)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    resources.cache_compilations()
    assert not list(tmp_path.iterdir())
    assert jax.config.jax_compilation_cache_dir == str(directory)


# ---------------------------------------------------------------- commands


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
    finished = run_python(code)
    assert (finished.stdout, finished.stderr) == ("1\n", "command: the disk is full\n")


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


def interrupted(cases: dict[str, tuple[str, float]], gaps: list[float], folder: Path) -> dict:
    """Status, stdout and stderr of commands side by side, after a Ctrl-C and others some seconds
    later. Each case is its work, and the seconds that it cleans up."""
    (folder / "slow.py").write_text(
        "import time\ntry:\n    time.sleep(0.6)\nexcept BaseException as error:\n    print(error)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    processes = {}
    for name, (work, cleaning) in cases.items():
        command = [sys.executable, "-c", COMMAND, work, str(cleaning)]
        processes[name] = start_interruptible(command, env=env, **pipes)
    for process in processes.values():
        assert process.stdout.readline() == "ready\n"
    for seconds in (0.1, *gaps):
        time.sleep(seconds)
        for process in processes.values():
            process.send_signal(signal.SIGINT)
    results = {name: process.communicate(timeout=60) for name, process in processes.items()}
    return {name: (process.returncode, *results[name]) for name, process in processes.items()}


def test_three_interruptions_are_one(tmp_path):
    cases = {where: (work, 0.5) for where, work in WORK.items()}
    for where, (status, output, errors) in interrupted(cases, [0.15, 0.15], tmp_path).items():
        assert (status, output) == (130, "cleaned up\n"), where
        lines = errors.splitlines()
        assert lines.pop() == "command: interrupted; all is kept"
        if where == "a job that stops at a safe point":
            assert lines.pop().startswith("SIGINT: stopping after the next checkpoint or test")
        assert lines in ([], [""]), where


def test_a_late_interruption_ends_a_command_that_cleans_up(tmp_path):
    results = interrupted({"waiting": (WORK["waiting"], 60)}, [0.2, 1.1], tmp_path)
    assert results["waiting"] == (130, "", "command: interrupted; all is kept\n")


def test_commands_answer_help_without_importing_jax():
    """`--help` is answered at once: jax, NumPy and TFDS are imported by the work itself."""
    commands = (
        *(f"drl_jax.{name}" for name in ("train", "evaluate", "compare", "convert")),
        *("drl_jax.search.__main__", "drl_jax.weights.download"),
        *("data_prep.build", "data_prep.check"),
    )
    heavy = (
        "jax flax numpy tensorflow_datasets orbax av grain PIL matplotlib starlette huggingface_hub"
    )
    code = (
        "import importlib, sys\n"
        f"for name in {heavy.split()}: sys.modules[name] = None\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name).main(['--help'])\n"
        "    except SystemExit as error:\n"
        "        assert error.code == 0\n"
    )
    printed = run_python(code, *commands).stdout
    for command in commands:
        assert f"usage: python -m {command.removesuffix('.__main__')} " in printed


def test_evaluation_and_the_api_import_no_optional_package():
    run_python(
        "import sys, drl_jax; drl_jax.load\n"
        "import drl_jax.runs.evaluate_run, drl_jax.data.batches\n"
        "bad = {'tensorflow', 'torch', 'clu', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not bad, bad"
    )


# ---------------------------------------------------------------- files


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
    # Writers in two containers have the same process id.
    with replacing(path) as one, replacing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "moved_away" / "file.txt", "first")
    assert list(tmp_path.iterdir()) == [path]


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


def caused(error: Exception, cause: Exception | None, context=None, *, is_hidden=False):
    error.__cause__, error.__context__ = cause, context
    error.__suppress_context__ = is_hidden
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
        (caused(ValueError("raise ... from None"), None, EIO, is_hidden=True), None),
        (ValueError("NOT_FOUND: Error [os_error_code='2']"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
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
