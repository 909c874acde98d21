"""Loads foreign weights into our parameters and back; every name of both sides is accounted for."""

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from drl_jax.config import BackboneConfig, Config, ConfigError, DataConfig, ModelConfig
from drl_jax.models.drl import Params, config_from_dict, init_params, param_shapes
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.temporal import TEMPORAL_HEADS
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import replacing
from drl_jax.weights.installed import weights_path
from drl_jax.weights.names import entries, from_hugging_face, is_hugging_face
from drl_jax.weights.torch_file import StateDict, read_metadata, read_torch_file

# Integers that OpenAI's archives store beside the weights.
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# Channels of an attention head in every CLIP that OpenAI published.
_OPENAI_HEAD_WIDTH = 64
# Keys of the configuration and the checksum in the metadata of a safetensors file that we write.
_CONFIG_KEY, _CHECKSUM_KEY = "drl_jax_config", "drl_jax_crc32"


class WeightsError(UserError):
    """Weights that do not fit the model; the message names the tensors."""


class Weights(NamedTuple):
    """The content of a file of weights.

    Attributes:
      state: tensors under the reference's names (CLIP's with the prefix `clip.`).
      config: the configuration that the file was exported with; None if it does not have one.
    """

    state: StateDict
    config: Config | None = None

    @property
    def has_heads(self) -> bool:
        """Whether the file has DRL heads beside CLIP."""
        return any(not name.startswith("clip.") for name in self.state)


def read_weights(source: str | os.PathLike) -> Weights:
    """Reads a file of weights.

    Args:
      source: name of installed weights (`installed.NAMES`), or the path of: OpenAI's CLIP, Hugging
        Face's CLIP, a DRL checkpoint in any form that `read_torch_file` reads, or a file that
        `save_weights` wrote.

    Raises:
      InstalledWeightsError: installed weights are missing or damaged.
      TorchFileError: the file cannot be read safely.
      WeightsError: it does not hold a CLIP ViT or a DRL checkpoint.
    """
    path = weights_path(source)
    state, metadata = read_torch_file(path), read_metadata(path)
    stored = metadata.get(_CHECKSUM_KEY)
    if stored is not None and stored != _checksum(state, metadata.get(_CONFIG_KEY, "")):
        raise WeightsError(f"{path} is damaged: its checksum is wrong; copy or export it again")
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if is_hugging_face(state):
        state = from_hugging_face(state)
    if not any(name.startswith("clip.") for name in state):
        state = {f"clip.{name}": tensor for name, tensor in state.items()}
    for name in _OPENAI_EXTRAS:
        state.pop(f"clip.{name}", None)
    if "clip.visual.layer1.0.conv1.weight" in state:
        raise WeightsError(f"{path} is a ResNet CLIP; DRL needs a ViT")
    if "clip.visual.conv1.weight" not in state:
        raise WeightsError(f"{path} holds no CLIP: it has no visual.conv1.weight")
    return Weights(state, _stored_config(path, metadata))


def _checksum(state: StateDict, config: str) -> str:
    """CRC-32 of the tensors and the configuration that we store; safetensors has no checksum."""
    crc32 = zlib.crc32(config.encode())
    for name, tensor in sorted(state.items()):
        crc32 = zlib.crc32(f"{name} {tensor.dtype} {tensor.shape}".encode(), crc32)
        crc32 = zlib.crc32(np.ascontiguousarray(tensor).data, crc32)
    return str(crc32)


def _stored_config(path: Path, metadata: Mapping[str, str]) -> Config | None:
    stored = metadata.get(_CONFIG_KEY)
    if stored is None:
        return None
    try:
        return config_from_dict(json.loads(stored))
    except (ValueError, ConfigError) as error:
        raise WeightsError(f"{path}: its stored configuration cannot be used: {error}") from error


def save_weights(
    path: Path,
    params: Params,
    config: Config,
    *,
    dtype: str = "float32",
    clip_only: bool = False,
) -> None:
    """Writes safetensors atomically under the reference's names, with the configuration.

    Args:
      path: of the file.
      params: parameters of the model.
      config: its configuration.
      dtype: "float32" or "float16", of the tensors in the file.
      clip_only: write CLIP alone, under OpenAI's names, as a model with the interaction dp and
        without temporal head.

    Raises:
      WeightsError: the file cannot be written, or a parameter is too large for float16.
    """
    if clip_only:
        params = {"backbone": params["backbone"]}
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, interaction="dp", agg_module="none"),
            loss=dataclasses.replace(config.loss, cdcr=0),
        )
    state = state_dict_from_params(params)
    if clip_only:
        state = {name.removeprefix("clip."): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if dtype == "float16" and np.abs(tensor).max() > np.finfo(dtype).max:
            raise WeightsError(f"{name} is too large for float16; use float32")
        state[name] = tensor.astype(dtype)
    stored = json.dumps(dataclasses.asdict(config))
    metadata = {"format": "pt", _CONFIG_KEY: stored, _CHECKSUM_KEY: _checksum(state, stored)}
    try:
        with replacing(path) as unfinished:
            save_file(state, unfinished, metadata=metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(f"cannot write {path}: {reason}") from error


# ---------------------------------------------------------------- configuration


def backbone_of_weights(weights: Weights) -> BackboneConfig:
    """Sizes of the towers: as stored with the weights, or inferred as OpenAI's `build_model` does.

    Raises:
      WeightsError: a tensor that tells a size is missing, or a width has no whole number of heads
        of 64 channels.
    """
    if weights.config is not None:
        return weights.config.model.backbone
    state = weights.state

    def shape(name: str) -> tuple[int, ...]:
        if f"clip.{name}" not in state:
            raise WeightsError(f"the weights lack {name}")
        return state[f"clip.{name}"].shape

    def layers(prefix: str) -> int:
        start = f"clip.{prefix}.resblocks."
        return len({n[len(start) :].split(".")[0] for n in state if n.startswith(start)})

    def heads(tower: str, width: int) -> int:
        if width % _OPENAI_HEAD_WIDTH:
            raise WeightsError(
                f"the {tower} tower has {width} channels, which are not heads of"
                f" {_OPENAI_HEAD_WIDTH} as in OpenAI's CLIP, and the file does not store its"
                " configuration; export the run again with: python -m drl_jax.convert RUN"
                " FILE.safetensors"
            )
        return width // _OPENAI_HEAD_WIDTH

    vision_width, _, patch, _ = shape("visual.conv1.weight")
    grid = round((shape("visual.positional_embedding")[0] - 1) ** 0.5)
    text_width = shape("ln_final.weight")[0]
    return BackboneConfig(
        family="clip",
        embed_dim=shape("text_projection")[1],
        image_resolution=grid * patch,
        vision_layers=layers("visual.transformer"),
        vision_width=vision_width,
        vision_heads=heads("image", vision_width),
        vision_patch_size=patch,
        context_length=shape("positional_embedding")[0],
        vocab_size=shape("token_embedding.weight")[0],
        text_width=text_width,
        text_heads=heads("text", text_width),
        text_layers=layers("transformer"),
    )


def heads_of_weights(config: ModelConfig, weights: Weights) -> ModelConfig:
    """The configuration with the interaction and the temporal head of a DRL checkpoint.

    `dp` and `ti` have no parameters: the configuration's own is kept if it is one of them, else
    `dp`.
    """
    names = weights.state.keys()
    changes = {} if config.interaction in ("dp", "ti") else {"interaction": "dp"}
    for interaction, cls in INTERACTIONS.items():
        if (fields := cls.config_of_weights(names)) is not None:
            changes = {"interaction": interaction, **fields}
    changes["agg_module"] = "none"
    for agg_module, head in TEMPORAL_HEADS.items():
        if head and (fields := head.config_of_weights(names)) is not None:
            changes |= {"agg_module": agg_module, **fields}
    return dataclasses.replace(config, **changes)


def config_of_weights(weights: Weights, interaction: str = "dp") -> Config:
    """The configuration of a model that is made of weights alone.

    Args:
      weights: with a stored configuration, which is used; or a complete DRL checkpoint, whose heads
        are inferred; or CLIP alone, which gets no temporal head, as in zero-shot retrieval.
      interaction: "dp" or "ti", for weights without interaction parameters.

    Raises:
      ConfigError: the sizes are impossible.
    """
    if weights.config is not None:
        model = dataclasses.replace(weights.config.model, init="")
        return dataclasses.replace(weights.config, model=model)
    model = dataclasses.replace(Config().model, interaction=interaction, agg_module="none")
    if weights.has_heads:
        model = heads_of_weights(model, weights)
    data, loss = DataConfig(holdout=500), dataclasses.replace(Config().loss, cdcr=0)
    return with_backbone_of(Config(data=data, model=model, loss=loss), weights)


def with_backbone_of(config: Config, weights: Weights) -> Config:
    """The configuration with the sizes of the towers from the weights, checked again.

    Raises:
      ConfigError: the configuration has other sizes, which are not the defaults; or the rest of it
        does not go with those of the weights.
    """
    backbone = backbone_of_weights(weights)
    if different := _differences(config.model.backbone, backbone):
        raise ConfigError(
            f"config.model.init={config.model.init} has other sizes than the configuration:"
            f" {', '.join(different)}; choose a configuration with these sizes or with the default"
            " sizes, which are those of any weights (configs/msrvtt.py), or train from scratch with"
            " --config.model.init="
        )
    model = dataclasses.replace(config.model, backbone=backbone)
    return config_from_dict(dataclasses.asdict(dataclasses.replace(config, model=model)))


def _differences(wanted: BackboneConfig, found: BackboneConfig) -> list[str]:
    """The sizes that a configuration asks for and the weights do not have.

    A configuration with the default sizes asks for none, and none asks for the default image size.
    """
    size = BackboneConfig.image_resolution
    if dataclasses.replace(wanted, image_resolution=size) == BackboneConfig():
        wanted = dataclasses.replace(found, image_resolution=wanted.image_resolution)
    if wanted.image_resolution == size:
        wanted = dataclasses.replace(wanted, image_resolution=found.image_resolution)
    values = dataclasses.asdict(found)
    return [
        f"{name} is {values[name]}, not {value}"
        for name, value in dataclasses.asdict(wanted).items()
        if value != values[name]
    ]


# ---------------------------------------------------------------- parameters


def params_from_state(state: StateDict, shapes: Params) -> Params:
    """Converts a state dict to parameters of the given shapes.

    Args:
      state: tensors under the reference's names.
      shapes: abstract parameters of the whole model, or {"backbone": ..} alone.

    Returns:
      float32 arrays in the structure of `shapes`.

    Raises:
      WeightsError: a tensor is missing, unknown or of another shape.
    """
    table = list(entries(shapes))
    wanted = {name: entry for entry in table for name in entry.names}
    known = set(wanted)
    for head in filter(None, TEMPORAL_HEADS.values()):
        if head.config_of_weights(wanted.keys()) is not None:
            known.update(head.UNUSED_REFERENCE_NAMES)
    if missing := sorted(set(wanted) - set(state)):
        raise WeightsError(f"the weights lack {_some(missing)}, which the model has")
    if unknown := sorted(set(state) - known):
        raise WeightsError(f"the weights have {_some(unknown)}, which the model does not have")
    for name, entry in wanted.items():
        if state[name].shape != entry.reference_shape():
            raise WeightsError(
                f"{name} is {state[name].shape} in the weights and {entry.reference_shape()} in the"
                " model"
            )
        if not jnp.issubdtype(state[name].dtype, jnp.floating):
            raise WeightsError(
                f"{name} has the type {state[name].dtype}; weights are floating-point numbers"
            )
    leaves = [
        jnp.asarray(entry.from_reference([state[name] for name in entry.names])) for entry in table
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _some(names: list[str]) -> str:
    """The first few of a list of names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def state_dict_from_params(params: Params) -> StateDict:
    """Converts parameters to a state dict under the reference's names, float32."""
    leaves = jax.tree.leaves(params)
    return {
        name: np.ascontiguousarray(tensor) if tensor.ndim else tensor
        for entry, leaf in zip(entries(params), leaves, strict=True)
        for name, tensor in zip(entry.names, entry.to_reference(np.asarray(leaf)), strict=True)
    }


def initial_params(config: ModelConfig, weights: Weights, key: jax.Array) -> Params:
    """Parameters to start training from.

    Args:
      config: the model, with the sizes of the weights.
      weights: CLIP, or a complete DRL checkpoint.
      key: for the heads that CLIP does not have; they start as copies of its text tower.

    Raises:
      WeightsError: the weights do not fit the model.
    """
    shapes = param_shapes(config)
    if weights.has_heads:
        return params_from_state(weights.state, shapes)
    backbone = params_from_state(weights.state, {"backbone": shapes["backbone"]})["backbone"]
    return jax.jit(init_params, static_argnums=0)(config, key, backbone)
