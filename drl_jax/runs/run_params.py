"""Parameters of a run that may be training meanwhile: of a checkpoint, and the initial ones."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from drl_jax.config import Config, ModelConfig
from drl_jax.models.drl import Params, abstract_params, init_params
from drl_jax.runs.checkpoint_files import CheckpointError, DamagedCheckpoint
from drl_jax.runs.checkpoints import DIRECTORY, Checkpoints
from drl_jax.runs.manifest import weights_sha256
from drl_jax.runs.workdir import WorkdirError, own_manifest
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.sharding import Layout
from drl_jax.weights.load import initial_params
from drl_jax.weights.weights_file import read_weights

# A checkpoint that cannot be read may be one that a training deletes at this moment. An error that
# is the same after a pause is believed.
_ATTEMPTS, _PAUSE = 30, 0.5
T = TypeVar("T")


def find_step(workdir: Path, checkpoint: str) -> int:
    """The step of a checkpoint of a run: "best", "latest" or a step, which need not exist.

    Raises:
      UserError: the run has no checkpoints, the name is none of these, or a metric cannot be read.
    """
    return _patiently(workdir, lambda checkpoints: checkpoints.find_step(checkpoint))


def restore_params(
    workdir: Path, model: ModelConfig, layout: Layout, checkpoint: str
) -> tuple[int, Params]:
    """Restores the parameters of a run.

    Args:
      workdir: directory of the run.
      model: its model.
      layout: shardings of the parameters.
      checkpoint: "best", "latest" or a step.

    Returns:
      The step and the parameters.

    Raises:
      CheckpointError: the run has no such checkpoint, or it is another run's, or damaged; then the
        message has the steps that are intact.
      Unavailable: a file cannot be read.
    """
    abstract = abstract_params(model, layout)
    step = None

    def restore(checkpoints: Checkpoints) -> tuple[int, Params]:
        nonlocal step
        step = None
        step = checkpoints.find_step(checkpoint)
        return step, checkpoints.restore_params(step, abstract)

    try:
        return _patiently(workdir, restore)
    except DamagedCheckpoint as error:
        if step is None:
            raise
        reason = error
    with Checkpoints(workdir, read_only=True) as checkpoints:
        intact = [
            other for other in checkpoints.steps() if _is_intact(checkpoints, other, abstract)
        ]
    choice = f"intact: {', '.join(map(str, intact))}" if intact else "no other one is intact"
    raise CheckpointError(
        f"checkpoint {step} in {workdir / DIRECTORY} is damaged: {reason}; {choice}"
    ) from reason


def remake_initial_params(workdir: Path, config: Config, layout: Layout) -> Params:
    """Makes the parameters that a run started from once more; no checkpoint has them.

    Args:
      workdir: directory of the run.
      config: its configuration.
      layout: shardings of the parameters.

    Raises:
      UserError: the initial weights cannot be read, or are not those that the run started from.
    """
    model, key = config.model, jax.random.key(config.seed)
    if not model.init:
        params = jax.jit(init_params, static_argnums=0)(model, key)
        return jax.device_put(params, layout.parameters(params))
    recorded = (own_manifest(workdir) or {}).get("weights_sha256")
    if recorded not in (None, weights_sha256(config)):
        raise WorkdirError(
            f"config.model.init={model.init} is another file than the run in {workdir} started from"
        )
    params = initial_params(model, read_weights(model.init, model.release), key)
    return jax.device_put(params, layout.parameters(params))


def _patiently(workdir: Path, read: Callable[[Checkpoints], T]) -> T:
    """What `read` returns; it is called again while other checkpoints cannot be read each time."""
    if not (workdir / DIRECTORY).is_dir():
        raise CheckpointError(f"no checkpoints in {workdir}; training writes one after each epoch")
    failed = ""
    for _ in range(_ATTEMPTS):
        with Checkpoints(workdir, read_only=True) as checkpoints:
            try:
                return read(checkpoints)
            except (DamagedCheckpoint, Unavailable) as error:
                if str(error) == failed:
                    raise
                failed = str(error)
        time.sleep(_PAUSE)
    raise CheckpointError(
        f"checkpoints in {workdir} are replaced faster than they can be read; try again, or after"
        " the training"
    )


def _is_intact(checkpoints: Checkpoints, step: int, abstract: Params) -> bool:
    try:
        checkpoints.restore_params(step, abstract)
    except UserError:
        return False
    return True
