"""Runs: any file of a checkpoint, and the run's own files."""

import hashlib
import json
from pathlib import Path
from random import Random

import jax
import numpy as np

from benchmarks.fuzz.damage import FAILURE, LEGITIMATE, Damage, damage_file, damage_tree
from benchmarks.fuzz.small_run import write_run
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.log_files import MetricsFile
from drl_jax.runs.workdir import load_config
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import abstract_state

# Text that a user may edit, without a checksum.
_EDITABLE = ("config.json", "metrics.json", "metrics.jsonl")


def prepare(root: Path) -> None:
    """Writes a run with a checkpoint of step 0."""
    write_run(root / "subjects" / "run", vocab_size=64)


def damage(root: Path, name: str, directory: Path, random: Random) -> Damage:
    """Damages one file; a third of the time one that a user may edit."""
    del root, name
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    editable = random.random() < 0.35
    path = random.choice([path for path in files if (path.name in _EDITABLE) == editable])
    where = path.relative_to(directory).parent
    if path.suffix == ".json" and editable and random.random() < 0.5:
        tree, what = damage_tree(json.loads(path.read_text(encoding="utf-8")), random)
        path.write_text(json.dumps(tree), encoding="utf-8")
        return Damage(f"{where / path.name}: {what}", LEGITIMATE)
    what = damage_file(path, random)
    return Damage(f"{where}/{what}", LEGITIMATE if editable else FAILURE)


def read(root: Path, name: str, directory: Path) -> str:
    """Digest of the state, the configuration, and the lines of the log that are kept."""
    del root, name
    config = load_config(directory)
    tx = make_optimizer(config.optim, 1)
    abstract = abstract_state(config.model, tx, make_layout(jax.devices()[:1]))
    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.find_step("best")
        state, _ = checkpoints.restore_state(step, abstract)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    log = directory / "metrics.jsonl"
    # As a resumed run does. Of an undamaged subject, all lines are kept.
    MetricsFile(directory, 5, evaluated=True)
    kept = log.read_text(encoding="utf-8") if log.is_file() else ""
    return f"{step} {digest.hexdigest()} {config} {kept}"
