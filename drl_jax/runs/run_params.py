"""Parameters of a run that may be training meanwhile: of a checkpoint, and the initial ones."""

import time
from pathlib import Path

import jax

from drl_jax.config import Config, ModelConfig
from drl_jax.models.drl import Params, abstract_params, init_params
from drl_jax.runs.checkpoint_files import CheckpointError, DamagedCheckpoint
from drl_jax.runs.checkpoints import DIRECTORY, Checkpoints
from drl_jax.runs.manifest import weights_sha256
from drl_jax.runs.workdir import MANIFEST_FILE, WorkdirError, read_manifest
from drl_jax.sharding import Layout
from drl_jax.weights.load import initial_params
from drl_jax.weights.weights_file import read_weights

# A checkpoint that cannot be read may be one that a training deletes at this moment. It is damaged
# if it cannot be read again after a pause.
_ATTEMPTS, _PAUSE = 30, 0.5


def find_step(workdir: Path, checkpoint: str) -> int:
    """The step of a checkpoint of a run: "best", "latest" or a step, which need not exist.

    Raises:
      CheckpointError: the run has no checkpoints, or the name is none of these.
    """
    _check_has_checkpoints(workdir)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.find_step(checkpoint)


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
      CheckpointError: the run has no such checkpoint, or it is damaged; the message has the steps
        that are intact.
    """
    _check_has_checkpoints(workdir)
    abstract = abstract_params(model, layout)
    failed = None
    for _ in range(_ATTEMPTS):
        with Checkpoints(workdir, read_only=True) as checkpoints:
            step = checkpoints.find_step(checkpoint)
            try:
                return step, checkpoints.restore_params(step, abstract)
            except DamagedCheckpoint as error:
                reason = str(error)
        if step == failed:
            break
        failed = step
        time.sleep(_PAUSE)
    else:
        raise CheckpointError(
            f"checkpoints in {workdir} are replaced faster than they can be read; try again, or"
            " after the training"
        )
    with Checkpoints(workdir, read_only=True) as checkpoints:
        intact = [
            other for other in checkpoints.steps() if _is_intact(checkpoints, other, abstract)
        ]
    choice = f"intact: {', '.join(map(str, intact))}" if intact else "no other one is intact"
    raise CheckpointError(
        f"checkpoint {step} in {workdir / DIRECTORY} is damaged: {reason}; {choice}"
    )


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
    manifest = workdir / MANIFEST_FILE
    recorded = read_manifest(manifest)["weights_sha256"] if manifest.exists() else None
    if recorded not in (None, weights_sha256(config)):
        raise WorkdirError(
            f"config.model.init={model.init} is another file than the run in {workdir} started from"
        )
    params = initial_params(model, read_weights(model.init, model.release), key)
    return jax.device_put(params, layout.parameters(params))


def _check_has_checkpoints(workdir: Path) -> None:
    if not (workdir / DIRECTORY).is_dir():
        raise CheckpointError(f"no checkpoints in {workdir}; training writes one after each epoch")


def _is_intact(checkpoints: Checkpoints, step: int, abstract: Params) -> bool:
    try:
        checkpoints.restore_params(step, abstract)
    except CheckpointError:
        return False
    return True
