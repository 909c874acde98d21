"""Parameters of a run that may be training meanwhile, and their exchange with files of weights."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from drl_jax.config import BackboneConfig, Config, ConfigError, ModelConfig
from drl_jax.models.drl import (
    Params,
    abstract_params,
    config_from_dict,
    copies_text_tower,
    init_params,
)
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.temporal import TEMPORAL_HEADS
from drl_jax.models.tokenizers import check_cleaning, with_tokenizer
from drl_jax.runs.checkpoint_files import CheckpointError, DamagedCheckpoint, owner
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.manifest import weights_sha256
from drl_jax.runs.weights_writer import merged, save_weights, write_tokenizer
from drl_jax.runs.workdir import (
    CHECKPOINTS,
    CONFIG_FILE,
    WorkdirError,
    claim_workdir,
    load_config,
    own_manifest,
)
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.sharding import Layout, make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import state_from_params
from drl_jax.weights.description import Description
from drl_jax.weights.load import config_of_weights, initial_params
from drl_jax.weights.weights_file import Weights, read_weights

# A checkpoint that cannot be read may be one that a training deletes at this moment. An error that
# is the same after a pause is believed.
_ATTEMPTS, _PAUSE = 30, 0.5
# Fields of BackboneConfig that say how frames and captions are prepared, and of the loss.
_NO_SIZES = ("pixel_mean", "pixel_std", "resize", "interpolation", "text_cleaning", "pad_id",
             "logit_bias")  # fmt: skip
T = TypeVar("T")


def find_step(workdir: Path, checkpoint: str) -> int:
    """The step of the checkpoint "best", "latest" or a step, which need not exist; errors of
    `Checkpoints.find_step`."""
    return _patiently(workdir, lambda checkpoints: checkpoints.find_step(checkpoint))


def restore_params(
    workdir: Path, model: ModelConfig, layout: Layout, checkpoint: str
) -> tuple[int, Params]:
    """The step and the parameters of the checkpoint "best", "latest" or a step of a run.

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
    intact = []
    with Checkpoints(workdir, read_only=True) as checkpoints:
        for other in checkpoints.steps():
            try:
                checkpoints.restore_params(other, abstract)
                intact.append(str(other))
            except UserError:
                continue
    choice = f"intact: {', '.join(intact)}" if intact else "no other one is intact"
    raise CheckpointError(
        f"checkpoint {step} in {workdir / CHECKPOINTS} is damaged: {reason}; {choice}"
    ) from reason


def _patiently(workdir: Path, read: Callable[[Checkpoints], T]) -> T:
    """What `read` returns; it is called again while other checkpoints cannot be read each time."""
    if not (workdir / CHECKPOINTS).is_dir():
        raise CheckpointError(f"no checkpoints in {workdir}; training writes one after each epoch")
    failed = ""
    for _ in range(_ATTEMPTS):
        with Checkpoints(workdir, read_only=True) as checkpoints:
            try:
                return read(checkpoints)
            # Also of a step that a training has just deleted.
            except (CheckpointError, Unavailable) as error:
                if str(error) == failed:
                    raise
                failed = str(error)
        time.sleep(_PAUSE)
    raise CheckpointError(
        f"checkpoints in {workdir} are replaced faster than they can be read; try again, or after"
        " the training"
    )


def remake_initial_params(workdir: Path, config: Config, layout: Layout) -> Params:
    """Makes the parameters that a run started from once more; no checkpoint has them.

    Raises:
      UserError: the initial weights cannot be read, or are not those that the run started from.
    """
    model, key = config.model, jax.random.key(config.seed)
    if not model.init:
        params = jax.jit(init_params, static_argnums=0)(model, key)
    else:
        recorded = (own_manifest(workdir) or {}).get("weights_sha256")
        if recorded not in (None, weights_sha256(config)):
            raise WorkdirError(
                f"config.model.init={model.init} is another file than the run in {workdir} started"
                " from"
            )
        weights = read_weights(model.init, model.release, model.weights_key)
        params = initial_params(model, weights, key)
    return jax.device_put(params, layout.parameters(params))


def with_backbone_of(config: Config, weights: Weights) -> Config:
    """The configuration with the description of the towers from the weights, checked again.

    The sigmoid loss has a bias of the logits also where the weights have none.

    Raises:
      ConfigError: the configuration has other sizes, which are not the defaults; or the rest of it
        does not go with those of the weights.
    """
    wanted, found = config.model.backbone, weights.description.backbone
    if config.loss.contrastive == "sigmoid" or wanted.logit_bias:
        found = dataclasses.replace(found, logit_bias=True)
    # A configuration with the default sizes asks for none, and none asks for the default image
    # size. What the file says of its input is known better than in a configuration.
    sizes = [field.name for field in dataclasses.fields(found) if field.name not in _NO_SIZES]
    asked = {name for name in sizes if getattr(wanted, name) != getattr(BackboneConfig, name)}
    if asked - {"image_resolution"}:
        asked |= set(sizes) - {"image_resolution"}
    values = {n: (getattr(found, n), getattr(wanted, n)) for n in sizes if n in asked}
    if different := [
        f"{n} is {one}, not {other}" for n, (one, other) in values.items() if one != other
    ]:
        raise ConfigError(
            f"config.model.init={config.model.init} has other sizes than the configuration:"
            f" {', '.join(different)}; choose a configuration with these or with the default sizes"
            " (configs/msrvtt.py), or train from scratch with config.model.init="
        )
    tokenizer = config.model.tokenizer or weights.tokenizer
    model = dataclasses.replace(config.model, backbone=found, tokenizer=tokenizer)
    return config_from_dict(dataclasses.asdict(dataclasses.replace(config, model=model)))


def head_start(config: ModelConfig, weights: Weights) -> str:
    """Says what the heads of a model start from."""
    if weights.has_heads:
        return "heads from the file, too"
    names = {"temporal head": TEMPORAL_HEADS[config.agg_module]}
    names |= {f"interaction {config.interaction}": INTERACTIONS[config.interaction]}
    heads = [name for name, head in names.items() if head and head.COPIED_POSITIONS]
    if not heads:
        return "no head starts from the text tower"
    if copies_text_tower(config):
        return f"{' and '.join(heads)}: from the text tower's blocks"
    backbone = config.backbone
    sizes = f"{backbone.embed_dim} channels and the text tower {backbone.text_width}"
    return f"{' and '.join(heads)}: new, since features have {sizes}"


# ---------------------------------------------------------------- files of weights


def import_weights(
    source: str | Path,
    workdir: Path,
    interaction: str = "dp",
    seed: int = 0,
    *,
    release: str = "",
    weights_key: str = "",
    tokenizer: str = "",
) -> tuple[Config, Description]:
    """Creates a run with one checkpoint, of step 0, from a file of weights.

    Args:
      source: name or file of weights: an exported run, towers alone (heads start as in training,
        from `seed`), or a DRL checkpoint.
      interaction: "dp" or "ti", for a file without interaction parameters.
      release, weights_key: as in `read_weights`.
      tokenizer: its file, if it is not beside that of the weights.

    Returns:
      The configuration of the run, and what is known of the towers.

    Raises:
      UserError: the file cannot be read or does not fit, or `workdir` holds a run.
    """
    weights = read_weights(source, release, weights_key)
    if tokenizer:
        weights = weights._replace(tokenizer=tokenizer)
    config = config_of_weights(weights, interaction)
    check_cleaning(config.model)
    params = initial_params(config.model, weights, jax.random.key(seed))
    create_run(workdir, config, params)
    return config, weights.description


def create_run(workdir: Path, config: Config, params: Params) -> None:
    """Creates a run with one checkpoint, of step 0; WorkdirError: `workdir` holds a run."""
    if (workdir / CONFIG_FILE).exists():
        raise WorkdirError(f"{workdir} already holds a run; choose another directory")
    claim_workdir(workdir, config)
    state = state_from_params(params, make_optimizer(config.optim, 0), make_layout())
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state)


def export_weights(
    workdir: Path,
    target: Path,
    checkpoint: str = "best",
    *,
    dtype: str = "float32",
    clip_only: bool = False,
) -> int:
    """Writes a checkpoint as safetensors under the reference's names; returns its step.

    The file has the configuration, the run and the step. A tokenizer that is a file is written
    beside it. `dtype` and `clip_only` are those of `save_weights`.

    Raises:
      UserError: no such run or checkpoint, the file cannot be written, or its folder has another
        tokenizer.
    """
    config = load_config(workdir)
    step, params = restore_params(workdir, config.model, make_layout(), checkpoint)
    config, params = merged(config, params)
    if config.model.tokenizer:
        config = with_tokenizer(config, write_tokenizer(Path(config.model.tokenizer), target))
    origin = owner(workdir / CHECKPOINTS / str(step))
    save_weights(target, params, config, dtype=dtype, clip_only=clip_only, origin=origin)
    return step
