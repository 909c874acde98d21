"""The lock of a directory, between real processes."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.commands import ROOT

from drl_jax.runtime.lock import LOCK_FILE, LockError, locked, temporary_directory

# Takes the lock, starts a child that it names, and holds the lock until its stdin ends.
HOLDER = """
import subprocess, sys
from pathlib import Path
from drl_jax.runtime.lock import locked
with locked(Path(sys.argv[1]), "the dataset"):
    print(subprocess.Popen(["sleep", "600"], close_fds=False).pid, flush=True)
    sys.stdin.read()
"""


# Makes a temporary directory, names it, and keeps it until its stdin ends.
KEEPER = """
import sys
from drl_jax.runtime.lock import temporary_directory
with temporary_directory() as directory:
    (directory / "clip.mp4").write_text("a part")
    print(directory, flush=True)
    sys.stdin.read()
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": tempfile.gettempdir()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, if its error has this number."""

    def set_error(number):
        def refuse(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", refuse)

    return set_error


def test_a_second_process_is_refused_until_the_first_one_is_killed(tmp_path):
    path = tmp_path / "new" / LOCK_FILE
    process = start(HOLDER, str(path))
    child = int(process.stdout.readline())
    try:
        with process:
            expected = (
                f"the dataset is in use by process {process.pid} on host {socket.gethostname()};"
                " wait for it to end, or stop it"
            )
            for _ in range(2):  # The refused attempt leaves the name of the holder.
                with pytest.raises(LockError) as error, locked(path, "the dataset"):
                    pass
                assert str(error.value) == expected
            process.kill()
        # Its child is alive and has no part in the lock.
        os.kill(child, 0)
        with locked(path, "the dataset"):
            assert path.read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    finally:
        os.kill(child, 9)


def test_the_lock_ends_with_the_block(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="in the block"), locked(tmp_path / LOCK_FILE, "it"):
            raise ValueError("in the block")
    assert (tmp_path / LOCK_FILE).exists()


def test_a_file_that_does_not_name_its_holder_yet(tmp_path):
    with (tmp_path / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LockError, match="it is in use by another process; wait"):
            locked(tmp_path / LOCK_FILE, "it").__enter__()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(number, no_locks, tmp_path, capsys):
    no_locks(number)
    with locked(tmp_path / LOCK_FILE, "it"):
        ran = True
    assert ran
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / LOCK_FILE} cannot be locked (")
    assert "nothing prevents a second process" in line


def test_the_temporary_directory_of_a_killed_process_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "drl_jax_temporary_file").touch()  # Of nobody.
    keepers = [start(KEEPER) for _ in range(2)]
    killed, running = [Path(keeper.stdout.readline().strip()) for keeper in keepers]
    keepers[0].kill()
    keepers[0].communicate()
    assert (killed / "clip.mp4").exists()
    with temporary_directory() as own:
        assert own.stat().st_mode & 0o777 == 0o700
        assert not killed.exists()
        with temporary_directory() as other:
            assert own.exists()
            assert (running / "clip.mp4").exists()
        assert not other.exists()
    keepers[1].communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["drl_jax_temporary_file"]


def test_a_temporary_directory_that_another_process_deletes_at_once(tmp_path, monkeypatch):
    """A process that looks for those of killed ones can come before the lock."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made, make = [], tempfile.mkdtemp

    def mkdtemp(**options: str) -> str:
        made.append(make(**options))
        if len(made) == 1:
            Path(made[0]).rmdir()
        if len(made) == 2:
            descriptor = os.open(made[1], os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with temporary_directory() as directory:
        assert str(directory) == made[2]


def test_a_temporary_directory_without_locks_is_kept(no_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    no_locks(errno.ENOLCK)
    with temporary_directory() as one, temporary_directory():
        assert one.exists()
    assert not one.exists()
