"""Kills a training with SIGKILL again and again, and compares it with an undisturbed one.

    python -m benchmarks.kills [--kills=20] [--pair_kills=10] [--record]

First a run of one process is killed `--kills` times, then a run of two processes `--pair_kills`
times: one of the two, or both. A kill comes during start-up, restore, steps, saves or evaluations.
Both runs must end with the parameters, optimiser state, metrics and TensorBoard curves of a run
that was never disturbed, bit for bit. Exit status: 1 if they do not.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.measure import arguments, positive_int, report
from drl_jax.runs.hooks import TIMING_TAGS

_EPOCHS = 20
_FLAGS = (
    "--config=configs/shapes.py:smoke",
    f"--config.train.epochs={_EPOCHS}",
    "--config.train.checkpoint_every=2",
    "--config.model.init=",
    "--config.model.temporal_layers=1",
    "--config.model.backbone.embed_dim=32",
    *(f"--config.model.backbone.{tower}_width=32" for tower in ("text", "vision")),
    *(f"--config.model.backbone.{tower}_heads=2" for tower in ("text", "vision")),
    *(f"--config.model.backbone.{tower}_layers=1" for tower in ("text", "vision")),
)
# Seconds that a run may take between two kills.
_TIME_LIMIT = 600


def start(workdir: Path, processes: int) -> list[subprocess.Popen]:
    """Starts a run as one process, or as several with a device each."""
    flags: list[list[str]] = [[]]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        cluster = ["--distributed=manual", f"--coordinator=localhost:{port}"]
        cluster.append(f"--num_processes={processes}")
        flags = [[*cluster, f"--process_id={index}"] for index in range(processes)]
    data = f"--config.data.data_dir={workdir.parent / 'data'}"
    log = (workdir.parent / f"{workdir.name}.log").open("ab")
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "drl_jax.train", *_FLAGS, data, f"--workdir={workdir}", *own],
            stdout=log,
            stderr=log,
            env=environment,
        )
        for own in flags
    ]


def finish(processes: Sequence[subprocess.Popen]) -> None:
    """Waits for a run to end well."""
    for process in processes:
        if process.wait(_TIME_LIMIT):
            raise SystemExit(f"a run ended with status {process.returncode}; see its log")


def kill(workdir: Path, processes: int, rng: random.Random) -> str:
    """Starts the run, kills it at a random time, and returns what it was doing."""
    running = start(workdir, processes)
    before = _last_step(workdir)
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0, 8))  # Start-up and restore.
    else:
        limit = time.monotonic() + _TIME_LIMIT
        while _last_step(workdir) == before and time.monotonic() < limit:
            if any(process.poll() is not None for process in running):
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 5))
    doing = _doing(workdir, before)
    victims = running if rng.random() < 0.5 else [rng.choice(running)]
    for process in victims:
        process.send_signal(signal.SIGKILL)
    # The other process ends by itself when it notices, after up to 100 s; a user kills it, too.
    time.sleep(rng.uniform(0, 1))
    for process in running:
        process.kill()
        process.wait()
    return doing


def _last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _doing(workdir: Path, before: int) -> str:
    """What a run is doing, by its files: `before` is the step at its start."""
    if not workdir.exists() or _last_step(workdir) <= before:
        return "starting"
    if any(workdir.glob("checkpoints/*tmp*")):
        return "saving"
    return "training or evaluating"


def state(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the latest checkpoint."""
    directory = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    own = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays: dict[str, np.ndarray] = {}
    for item in ("params", "opt_state"):
        path, handler = directory.absolute() / item, ocp.StandardCheckpointHandler()
        # From any number of devices to one.
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own),
            handler.metadata(path).tree,
        )
        tree = handler.restore(path, args=ocp.args.StandardRestore(wanted))
        for key, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[item + jax.tree_util.keystr(key)] = np.asarray(leaf)
    return arrays


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without the speed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{tag: line[tag] for tag in line if tag not in TIMING_TAGS} for line in lines]


def summaries(workdir: Path) -> dict[str, list[tuple]]:
    """What TensorBoard shows by tag, without the speed: steps and scalars, pictures or texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    pictures = {
        tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)]
        for tag in tags["images"]
    }
    texts = {
        tag: [(e.step, make_ndarray(e.tensor_proto).tolist()) for e in events.Tensors(tag)]
        for tag in tags["tensors"]
    }
    shown = {**scalars, **pictures, **texts}
    return {tag: shown[tag] for tag in shown if tag not in TIMING_TAGS}


def compare(killed: Path, whole: Path) -> dict[str, bool]:
    """What two finished runs have in common."""
    one, other = state(killed), state(whole)
    same_arrays = one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name]) for name in other
    )
    results = [json.loads((run / "result.json").read_text()) for run in (killed, whole)]
    return {
        "same_arrays": same_arrays,
        "same_metrics": metrics(killed) == metrics(whole),
        "same_summaries": summaries(killed) == summaries(whole),
        "same_result": results[0] == results[1],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = arguments(
        *("kills", __doc__),
        ("kills", positive_int, 20, "of one process"),
        ("pair_kills", positive_int, 10, "of two processes"),
        ("seed", int, 0, "of the times"),
    ).parse_args(argv)
    rng, rows = random.Random(options.seed), []
    root = Path(tempfile.mkdtemp(prefix="kills_"))
    print(f"runs and logs in {root}")
    for processes, kills in ((1, options.kills), (2, options.pair_kills)):
        whole, killed = root / f"whole_{processes}", root / f"killed_{processes}"
        finish(start(whole, processes))
        doing: Counter[str] = Counter()
        for number in range(kills):
            what = kill(killed, processes, rng)
            doing[what] += 1
            at = f"{processes} processes, kill {number + 1}"
            print(f"{at}: {what}, step {_last_step(killed)}", flush=True)
        finish(start(killed, processes))
        during = ", ".join(f"{count} {what}" for what, count in sorted(doing.items()))
        rows.append(
            {"processes": processes, "kills": kills, "during": during, **compare(killed, whole)}
        )
    report(rows, options, seed=options.seed, epochs=_EPOCHS)
    return 0 if all(value is not False for row in rows for value in row.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
