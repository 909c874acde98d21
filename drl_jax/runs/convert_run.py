"""Converts files of weights to runs, and runs to files of weights."""

from pathlib import Path

import jax

from drl_jax.config import Config
from drl_jax.models.tokenizers import check_cleaning, stored_name, with_tokenizer
from drl_jax.runs.checkpoint_files import owner
from drl_jax.runs.checkpoints import DIRECTORY, Checkpoints
from drl_jax.runs.run_params import restore_params
from drl_jax.runs.workdir import WorkdirError, claim_workdir, load_config
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.files import copy_once
from drl_jax.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.state import state_from_params
from drl_jax.weights.description import Description
from drl_jax.weights.load import config_of_weights, initial_params
from drl_jax.weights.weights_file import read_weights, save_weights


def import_weights(
    source: str | Path,
    workdir: Path,
    interaction: str = "dp",
    seed: int = 0,
    *,
    release: str = "",
    tokenizer: str = "",
) -> tuple[Config, Description]:
    """Creates a run with one checkpoint, of step 0, from a file of weights.

    Args:
      source: name or file of weights: an exported run, towers alone (heads start as in training),
        or a DRL checkpoint.
      workdir: must not hold a run.
      interaction: "dp" or "ti", for a file without interaction parameters.
      seed: for the heads that the towers do not have.
      release: as in `read_weights`.
      tokenizer: its file, if it is not beside that of the weights.

    Returns:
      The configuration of the run, with the sizes and heads of the weights, and what is known of
      the towers.

    Raises:
      UserError: the file cannot be read or does not fit, or `workdir` holds a run.
    """
    if (workdir / "config.json").exists():
        raise WorkdirError(f"{workdir} already holds a run; choose another directory")
    weights = read_weights(source, release)
    if tokenizer:
        weights = weights._replace(tokenizer=tokenizer)
    config = config_of_weights(weights, interaction)
    check_cleaning(config.model)
    params = initial_params(config.model, weights, jax.random.key(seed))
    claim_workdir(workdir, config)
    state = state_from_params(params, make_optimizer(config.optim, 0), make_layout())
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state)
    return config, weights.description


def export_weights(
    workdir: Path,
    target: Path,
    checkpoint: str = "best",
    *,
    dtype: str = "float32",
    clip_only: bool = False,
) -> int:
    """Writes a checkpoint as safetensors under the reference's names; returns its step.

    The file holds the configuration, so that importing it gives the same model, and the run and the
    step. A tokenizer that is a file is written beside it.

    Args:
      workdir: the run.
      target: the file.
      checkpoint: "best", "latest" or a step.
      dtype: as in `save_weights`.
      clip_only: as in `save_weights`.

    Raises:
      UserError: no such run or checkpoint, the file cannot be written, or its folder has another
        tokenizer.
    """
    config = load_config(workdir)
    step, params = restore_params(workdir, config.model, make_layout(), checkpoint)
    if config.model.tokenizer:
        config = with_tokenizer(config, _write_tokenizer(Path(config.model.tokenizer), target))
    origin = owner(workdir / DIRECTORY / str(step))
    save_weights(target, params, config, dtype=dtype, clip_only=clip_only, origin=origin)
    return step


def _write_tokenizer(tokenizer: Path, target: Path) -> str:
    """Writes a run's tokenizer beside an exported file; returns its name."""
    copy = target.with_name(stored_name(tokenizer))
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_once(tokenizer, copy)
    except FileExistsError as error:
        raise UserError(
            f"{copy} is another tokenizer than the run's; export to another folder"
        ) from error
    except OSError as error:
        raise Unavailable(copy, error, "written") from error
    return copy.name
