"""Foreign weights into our parameters and back, every name of both sides accounted for."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from drl_jax.config import ClipConfig, Config, DataConfig, ModelConfig
from drl_jax.models.drl import Params, copy_text_tower, init_params
from drl_jax.runtime.errors import UserError
from drl_jax.weights.names import entries, from_hugging_face, is_hugging_face
from drl_jax.weights.torch_file import StateDict, read_torch_file

# Integers that OpenAI's archives carry beside the weights.
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# Beside seqLSTM the reference keeps the positions of seqTransf, and never uses them.
_UNUSED_POSITIONS = "frame_position_embeddings.weight"


class WeightsError(UserError):
    """Weights that do not fit the model; the message names the tensors."""


def read_weights(path: Path) -> StateDict:
    """A file's tensors under the reference's names (CLIP's with the prefix `clip.`).

    Args:
      path: OpenAI's CLIP, Hugging Face's CLIP or a DRL checkpoint, in any form that
        `read_torch_file` reads.

    Raises:
      TorchFileError: the file cannot be read safely.
      WeightsError: it holds something else.
    """
    state = read_torch_file(path)
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if is_hugging_face(state):
        state = from_hugging_face(state)
    if not any(name.startswith("clip.") for name in state):
        state = {f"clip.{name}": tensor for name, tensor in state.items()}
    for name in _OPENAI_EXTRAS:
        state.pop(f"clip.{name}", None)
    if "clip.visual.layer1.0.conv1.weight" in state:
        raise WeightsError(f"{path} is a ResNet CLIP; DRL is built on the ViTs")
    if "clip.visual.conv1.weight" not in state:
        raise WeightsError(f"{path} holds no CLIP: it has no visual.conv1.weight")
    return state


def infer_clip(state: StateDict) -> ClipConfig:
    """Sizes of the towers from the shapes of their weights, as OpenAI's `build_model` does.

    Raises:
      WeightsError: a tensor that tells a size is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if f"clip.{name}" not in state:
            raise WeightsError(f"the weights lack {name}")
        return state[f"clip.{name}"].shape

    def layers(prefix: str) -> int:
        start = f"clip.{prefix}.resblocks."
        return len({n[len(start) :].split(".")[0] for n in state if n.startswith(start)})

    vision_width, _, patch, _ = shape("visual.conv1.weight")
    grid = round((shape("visual.positional_embedding")[0] - 1) ** 0.5)
    text_width = shape("ln_final.weight")[0]
    return ClipConfig(
        embed_dim=shape("text_projection")[1],
        image_resolution=grid * patch,
        vision_layers=layers("visual.transformer"),
        vision_width=vision_width,
        vision_heads=vision_width // 64,
        vision_patch_size=patch,
        context_length=shape("positional_embedding")[0],
        vocab_size=shape("token_embedding.weight")[0],
        text_width=text_width,
        text_heads=text_width // 64,
        text_layers=layers("transformer"),
    )


def infer_heads(config: ModelConfig, state: StateDict) -> ModelConfig:
    """The interaction and the temporal head that a DRL checkpoint has, with their sizes.

    `dp` and `ti` have no parameters: of these two, the configuration's own is kept, or `dp`.
    """
    linear = {name for name in state if name.startswith("text_weight_fc.") and "weight" in name}
    changes = {}
    if "similarity_dense.weight" in state:
        changes["interaction"] = "xti"
    elif linear:
        changes.update(interaction="wti", wti_arch=sum(n.endswith(".weight") for n in linear))
    elif config.interaction not in ("dp", "ti"):
        changes["interaction"] = "dp"

    def layers(start: str) -> int:
        return len({name[len(start) :].split(".")[0] for name in state if name.startswith(start)})

    changes["agg_module"] = "none"
    if "lstm_visual.weight_ih_l0" in state:
        changes["agg_module"] = "seqLSTM"
    elif count := layers("transformerClip.resblocks."):
        changes.update(agg_module="seqTransf", temporal_layers=count)
    if count := layers("cross.transformer.resblocks."):
        changes["cross_layers"] = count
    return dataclasses.replace(config, **changes)


def config_of_weights(state: StateDict, interaction: str = "dp") -> Config:
    """A configuration for weights alone.

    Args:
      state: a whole DRL checkpoint, whose heads are inferred, or CLIP alone, which is then used
        without a temporal head, as zero-shot retrieval does.
      interaction: "dp" or "ti", of weights that do not say.

    Raises:
      ConfigError: the sizes are impossible.
    """
    model = dataclasses.replace(Config().model, interaction=interaction, agg_module="none")
    if is_whole_drl(state):
        model = infer_heads(model, state)
    data, loss = DataConfig(holdout=500), dataclasses.replace(Config().loss, cdcr=0)
    return with_sizes_of(Config(data=data, model=model, loss=loss), state)


def is_whole_drl(state: StateDict) -> bool:
    """Whether a state dict has more than CLIP in it."""
    return any(not name.startswith("clip.") for name in state)


def params_from_state(state: StateDict, shapes: Params) -> Params:
    """A state dict as parameters of the given shapes.

    Args:
      state: the reference's names.
      shapes: abstract parameters: the whole model, or {"clip": ..} alone.

    Returns:
      float32 arrays in the structure of `shapes`.

    Raises:
      WeightsError: a tensor is missing, unknown or of another shape.
    """
    table = list(entries(shapes))
    wanted = {name: entry for entry in table for name in entry.names}
    known = set(wanted)
    if any(name.startswith("lstm_visual.") for name in wanted):
        known.add(_UNUSED_POSITIONS)
    if missing := sorted(set(wanted) - set(state)):
        raise WeightsError(f"the weights lack {_some(missing)}, which the model has")
    if unknown := sorted(set(state) - known):
        raise WeightsError(f"the weights have {_some(unknown)}, which the model has not")
    for name, entry in wanted.items():
        if state[name].shape != entry.reference_shape():
            raise WeightsError(
                f"{name} is {state[name].shape} in the weights and {entry.reference_shape()} in the"
                " model"
            )
    leaves = [
        jnp.asarray(entry.from_reference([state[name] for name in entry.names])) for entry in table
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _some(names: list[str]) -> str:
    """The first few of a list of names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def state_dict_from_params(params: Params) -> StateDict:
    """Parameters as a state dict with the reference's names, float32."""
    leaves = jax.tree.leaves(params)
    return {
        name: np.ascontiguousarray(tensor) if tensor.ndim else tensor
        for entry, leaf in zip(entries(params), leaves, strict=True)
        for name, tensor in zip(entry.names, entry.to_reference(np.asarray(leaf)), strict=True)
    }


def save_state(path: Path, state: StateDict) -> None:
    """Writes safetensors: the whole file or nothing."""
    unfinished = path.with_name(path.name + ".part")
    save_file(state, unfinished, metadata={"format": "pt"})
    unfinished.replace(path)


def with_sizes_of(config: Config, state: StateDict) -> Config:
    """The configuration with CLIP's sizes from the weights, checked again.

    Raises:
      ConfigError: the rest of the configuration does not go with these sizes.
    """
    model = dataclasses.replace(config.model, clip=infer_clip(state))
    return Config.from_dict(dataclasses.asdict(dataclasses.replace(config, model=model)))


def initial_params(config: ModelConfig, state: StateDict, key: jax.Array) -> Params:
    """Parameters to start training from.

    Args:
      config: the model, with the sizes of the weights.
      state: CLIP's tensors, or those of a whole DRL checkpoint.
      key: for the heads that CLIP does not bring; these start as copies of its text tower.

    Raises:
      WeightsError: the weights do not fit the model.
    """
    shapes = jax.eval_shape(lambda: init_params(config, key))
    if is_whole_drl(state):
        return params_from_state(state, shapes)
    clip = params_from_state(state, {"clip": shapes["clip"]})["clip"]
    fresh = jax.jit(init_params, static_argnums=0)(config, key)
    return copy_text_tower(config, {**fresh, "clip": clip})
