"""Converts weights between the reference's files and runs of this program.

    python -m drl_jax.convert ViT-B-32.pt runs/clip        (a file becomes a run's directory)
    python -m drl_jax.convert runs/msrvtt drl.safetensors  (a run's checkpoint becomes a file)

Files that are read: OpenAI's and Hugging Face's CLIP, DRL's `pytorch_model.bin`. The file that is
written holds safetensors under the reference's names.
"""

from pathlib import Path

import jax
from absl import flags

from drl_jax.config import Config
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.workdir import WorkdirError, claim_workdir, load_config
from drl_jax.runtime import cli as command
from drl_jax.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.state import abstract_params, state_from_params
from drl_jax.weights.load import (
    config_of_weights,
    initial_params,
    read_weights,
    save_state,
    state_dict_from_params,
)


def import_weights(source: Path, workdir: Path, interaction: str = "dp", seed: int = 0) -> Config:
    """Makes a run's directory, with one checkpoint of step 0, of a file of weights.

    Args:
      source: CLIP alone (its heads start as training would start them) or a whole DRL checkpoint.
      workdir: must not hold checkpoints yet.
      interaction: "dp" or "ti", of a file that does not say.
      seed: for the heads that CLIP does not bring.

    Returns:
      The configuration of the run, with the sizes and heads of the weights.

    Raises:
      UserError: the file cannot be read, does not fit, or `workdir` holds a run.
    """
    if (workdir / "config.json").exists():
        raise WorkdirError(f"{workdir} holds a run already; give another directory")
    weights = read_weights(source)
    config = config_of_weights(weights, interaction)
    params = initial_params(config.model, weights, jax.random.key(seed))
    claim_workdir(workdir, config)
    state = state_from_params(params, make_optimizer(config.optim, 0), make_layout())
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state)
    return config


def export_weights(workdir: Path, target: Path, checkpoint: str = "best") -> int:
    """Writes a checkpoint of a run as safetensors under the reference's names; returns its step.

    Raises:
      UserError: no such run or checkpoint.
    """
    config = load_config(workdir)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.find_step(checkpoint)
        params = checkpoints.restore_params(step, abstract_params(config.model, make_layout()))
    save_state(target, state_dict_from_params(params))
    return step


_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best, latest or a step of the run.")
_INTERACTION = flags.DEFINE_enum(
    "interaction", "dp", ["dp", "ti"], "Of a file without interaction weights."
)


def main(source: Path, target: Path) -> None:
    if source.is_dir():
        if target.suffix != ".safetensors":
            raise WorkdirError(f"a run is written to a file NAME.safetensors, not {target}")
        step = export_weights(source, target, _CHECKPOINT.value)
        print(f"wrote {target}: checkpoint {step} of {source}")
    else:
        model = import_weights(source, target, _INTERACTION.value).model
        print(f"wrote {target}: interaction {model.interaction}, agg_module {model.agg_module}")


if __name__ == "__main__":
    command.run_with_paths(main, "IN", "OUT")
