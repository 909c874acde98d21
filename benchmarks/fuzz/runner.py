"""Runs inputs in worker processes and judges what the readers made of them."""

import dataclasses
import functools
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from benchmarks.fuzz.damage import FAILURE, LEGITIMATE, UNDETECTABLE, Damage
from drl_jax.data.video_file import VideoError
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.resources import memory_limit
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes

KINDS = ("videos", "annotations", "weights", "index", "checkpoints")
# Seconds for one input, and bytes that it may allocate beyond what the process has.
TIME_LIMIT, MEMORY_LIMIT = 10.0, 2 * 2**30
# A process that does not answer for so long is killed. A new process imports and compiles first.
_KILLED_AFTER = 90.0
_MAX_MESSAGE = 900
# Outcomes. The first four are accepted.
IDENTICAL, REFUSED, CHANGED, UNDETECTED, FAILED = OUTCOMES = (
    *("identical", "refused", LEGITIMATE, UNDETECTABLE, FAILURE),
)


class InvalidResult(Exception):
    """A reader returned what it must not return."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a reader made of an input."""

    kind: str
    number: int  # with the seed, it makes the input again
    subject: str = ""  # what was damaged
    damage: str = ""  # in words
    status: str = FAILED  # one of OUTCOMES
    detail: str = ""  # the message of the error, or why the input failed
    seconds: float = 0.0  # that the reader took
    trace: str = ""  # traceback of a failure


def prepare(kind: str, root: Path, clips: Path | None = None) -> None:
    """Writes the undamaged subjects of a kind; `clips` is a folder of more videos."""
    more = {"clips": clips} if kind == "videos" else {}
    _module(kind).prepare(root, **more)


def make_input(
    kind: str, root: Path, seed: int, number: int, directory: Path
) -> tuple[str, Damage]:
    """Makes a damaged input, the same for the same arguments, in a new directory.

    Returns:
      The name of the subject, and what was done to it.
    """
    random = Random(f"{seed}/{kind}/{number}")
    name = random.choice(sorted(path.name for path in (root / "subjects").iterdir()))
    shutil.copytree(root / "subjects" / name, directory)
    return name, _module(kind).damage(root, name, directory, random)


def run_input(kind: str, root: Path, seed: int, number: int) -> Outcome:
    """Makes an input, reads it within the limits, and judges the result."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as scratch:
        directory = Path(scratch) / "input"
        name, damage = make_input(kind, root, seed, number, directory)
        return judge(Outcome(kind, number, name, damage.what), damage.if_changed, root, directory)


def judge(outcome: Outcome, if_changed: str, root: Path, directory: Path) -> Outcome:
    """Reads an input and completes its outcome, of which kind, number and subject are known."""
    expected = _expected(outcome.kind, root, outcome.subject)
    start = time.monotonic()
    try:
        with memory_limit(MEMORY_LIMIT):
            found = _module(outcome.kind).read(root, outcome.subject, directory)
    except (UserError, VideoError) as error:
        status, detail = _judged_message(str(error)), str(error)
        trace = traceback.format_exc() if status == FAILED else ""
    # Whatever else a reader raises is what this program looks for.
    except Exception as error:
        status, detail, trace = FAILED, f"{type(error).__name__}: {error}", traceback.format_exc()
    else:
        status, detail, trace = IDENTICAL if found == expected else if_changed, "", ""
        if status == FAILED:
            detail = "another result without an error"
    seconds = time.monotonic() - start
    if seconds > TIME_LIMIT:
        status, detail = FAILED, f"took {seconds:.1f} s; {detail}"
    return dataclasses.replace(
        outcome, status=status, detail=detail, seconds=round(seconds, 3), trace=trace
    )


def _judged_message(message: str) -> str:
    """A refusal is one short line that a terminal can print."""
    try:
        message.encode()
    except UnicodeEncodeError:
        return FAILED
    one_line = len(message.splitlines()) == 1 and len(message) < _MAX_MESSAGE
    words = ("Traceback", "MemoryError")
    return REFUSED if one_line and not any(word in message for word in words) else FAILED


def run_inputs(
    kinds: Sequence[str], roots: dict[str, Path], seed: int, inputs: int
) -> Iterator[Outcome]:
    """Yields the outcomes of `inputs` inputs of each kind.

    An input that kills its process, or does not end, is an outcome too.
    """
    calls = [(kind, roots[kind], seed, number) for kind in kinds for number in range(inputs)]
    found = map_in_processes(_run_quietly, calls, timeout=_KILLED_AFTER)
    for (kind, _, _, number), outcome in zip(calls, found, strict=True):
        if isinstance(outcome, WorkerFailure):
            with tempfile.TemporaryDirectory(prefix="fuzz") as scratch:
                made = make_input(kind, roots[kind], seed, number, Path(scratch) / "input")
            outcome = Outcome(kind, number, made[0], made[1].what, detail=outcome.reason)
        yield outcome


def _run_quietly(kind: str, root: Path, seed: int, number: int) -> Outcome:
    _discard_stderr()
    return run_input(kind, root, seed, number)


@functools.cache
def _discard_stderr() -> None:
    """FFmpeg and Orbax log pages about every damaged file, also from C and from threads."""
    with Path(os.devnull).open("w") as devnull:
        os.dup2(devnull.fileno(), sys.stderr.fileno())


def save_failure(outcome: Outcome, root: Path, seed: int, directory: Path) -> None:
    """Writes a failed input, with what was done to it and the traceback."""
    target = directory / f"{outcome.kind}_{seed}_{outcome.number}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    name, damage = make_input(outcome.kind, root, seed, outcome.number, target / "input")
    outcome = dataclasses.replace(outcome, subject=name, damage=damage.what)
    record = dataclasses.asdict(outcome)
    (target / "traceback.txt").write_text(record.pop("trace") or "no traceback\n", errors="replace")
    (target / "outcome.json").write_text(json.dumps(record, indent=1))


@functools.cache
def _expected(kind: str, root: Path, name: str) -> str:
    """What is read from an undamaged subject; also compiles what the reader needs.

    Empty for a video that is refused as it is, which `prepare` may be given.
    """
    try:
        return _module(kind).read(root, name, root / "subjects" / name)
    except VideoError:
        return ""


def _module(kind: str):
    return importlib.import_module(f"benchmarks.fuzz.{kind}")
