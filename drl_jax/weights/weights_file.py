"""Reads and writes files of weights; names in memory are the reference's."""

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from drl_jax.config import Config, ConfigError
from drl_jax.models.drl import Params, config_from_dict
from drl_jax.models.tokenizers import tokenizer_of_weights
from drl_jax.runtime.errors import Unavailable, one_line
from drl_jax.runtime.files import replacing, sha256
from drl_jax.weights.description import Description, check_beside, check_release, describe
from drl_jax.weights.download import MODELS
from drl_jax.weights.hub import is_hub_name, resolved_revision
from drl_jax.weights.hugging_face import (
    from_hugging_face,
    is_hugging_face,
    siglip_to_hugging_face,
)
from drl_jax.weights.json_values import WeightsError
from drl_jax.weights.names import entries
from drl_jax.weights.releases import PUBLISHED
from drl_jax.weights.source import weights_path
from drl_jax.weights.torch_file import StateDict, read_metadata, read_torch_file

# Integers that OpenAI's archives store beside the weights.
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# Keys in the metadata of a safetensors file that we write.
_CONFIG_KEY, _ORIGIN_KEY, _CHECKSUM_KEY = "drl_jax_config", "drl_jax_origin", "drl_jax_crc32"
_SUPPORTED = (
    "supported are CLIP (OpenAI, open_clip, Hugging Face), SigLIP and SigLIP 2 of a fixed"
    " resolution (Hugging Face), PE-Core T, S, B and L (Meta), and DRL checkpoints"
)
# (pattern of a tensor's name, what has such names)
_UNSUPPORTED_NAMES = (
    (r"visual\.layer1\.0\.conv1\.weight$", "a ResNet CLIP; DRL needs a ViT"),
    (r"video_model\.", "VideoPrism, a video model; DRL needs the feature of each frame"),
    (r"(vision_encoder|vision_align|text_encoder)\.", "InternVideo2 or a model like it"),
    (r"(visual\.trunk|text\.transformer)\.", "open_clip's form of another library's towers"),
    (
        r".*(qweight|weight_scale|weight_scale_inv|\.SCB|absmax|quant_state.*)$",
        "quantised; get the float weights",
    ),
)


class Weights(NamedTuple):
    """The content of a file of weights.

    Attributes:
      state: tensors under the reference's names (those of the towers with the prefix `clip.`).
      description: of the towers.
      config: the configuration that the file was exported with; None if it does not have one.
      tokenizer: path of the tokenizer beside the file; empty if there is none, or if the towers
        have CLIP's.
    """

    state: StateDict
    description: Description
    config: Config | None = None
    tokenizer: str = ""

    @property
    def has_heads(self) -> bool:
        """Whether the file has DRL heads beside the towers."""
        return any(not name.startswith("clip.") for name in self.state)


def read_weights(source: str | os.PathLike, release: str = "") -> Weights:
    """Reads a file of weights.

    Args:
      source: what `weights_path` takes; a file of towers, a DRL checkpoint in any form that
        `read_torch_file` reads, or a file that `save_weights` wrote.
      release: a name of `releases.RELEASES`, for a CLIP whose activation no description says.

    Raises:
      InstalledWeightsError: installed weights are missing or damaged.
      HubError: a repository cannot be used, see `hub.download`.
      TorchFileError: the file cannot be read safely.
      WeightsError: it does not hold supported towers, nothing says their activation, or what the
        file, the release and a description beside it say is contradictory.
    """
    check_release(release)
    path = weights_path(source)
    if re.search(r"-\d+-of-\d+\.|\.index\.json$", path.name):
        raise WeightsError(f"{path} is one part of sharded weights; join them into one file")
    state, metadata = read_torch_file(path), read_metadata(path)
    stored = metadata.get(_CHECKSUM_KEY)
    about = metadata.get(_CONFIG_KEY, "") + metadata.get(_ORIGIN_KEY, "")
    if stored is not None and stored != _checksum(state, about):
        raise WeightsError(f"{path} is damaged: its checksum is wrong; copy or export it again")
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    _refuse_unsupported(path, state)
    if is_hugging_face(state):
        state = from_hugging_face(state)
    is_archive = all(name in state for name in _OPENAI_EXTRAS)
    for name in _OPENAI_EXTRAS:
        state.pop(name, None)
    # As checkpoints of the PyTorch original of DRL, which knows OpenAI's CLIP only.
    is_like_drl = any(name.startswith("clip.") for name in state)
    if not is_like_drl:
        state = {f"clip.{name}": tensor for name, tensor in state.items()}
    if "clip.visual.conv1.weight" not in state:
        raise WeightsError(f"{path} holds no towers: it has no visual.conv1.weight; {_SUPPORTED}")
    towers = {n.removeprefix("clip."): t for n, t in state.items() if n.startswith("clip.")}
    if _CONFIG_KEY in metadata:
        config, origin = _stored_config(path, metadata)
        if release:
            raise WeightsError(f"{path} says what it is; leave the release out")
        check_beside(path, towers, config.model.backbone)
        description = Description(config.model.backbone, f"the file{origin}")
        tokenizer = tokenizer_of_weights(path, config.model.backbone, config.model.tokenizer)
        return Weights(state, description, config, tokenizer)
    is_openais = is_archive and sha256(path) in MODELS.values()
    likeness = "names of tensors as in DRL's original" if is_like_drl else ""
    if is_archive:
        likeness = f"OpenAI's archive (by its {'sha256' if is_openais else 'form'})"
    description = describe(towers, path, release=release, likeness=likeness, is_openais=is_openais)
    licence = description.licence
    if is_hub_name(source):
        licences = {published.source: published.licence for published in PUBLISHED.values()}
        licence = licence or licences.get(source, "")
    revision = resolved_revision(path) or ""
    description = description._replace(revision=revision, licence=licence)
    tokenizer = tokenizer_of_weights(path, description.backbone)
    return Weights(state, description, tokenizer=tokenizer)


def _refuse_unsupported(path: Path, state: StateDict) -> None:
    """Raises WeightsError, by the name of what a file holds."""
    for name, tensor in state.items():
        for pattern, what in _UNSUPPORTED_NAMES:
            if re.match(pattern, name):
                raise WeightsError(f"{path} is {what} ({name}); {_SUPPORTED}")
        if name.endswith(".weight") and tensor.dtype.kind in "iub":
            raise WeightsError(f"{path} is quantised: {name} is {tensor.dtype}; get the floats")
    patches = state.get("vision_model.embeddings.patch_embedding.weight")
    if patches is not None and patches.ndim == 2:
        raise WeightsError(f"{path} is a NaFlex SigLIP 2, of any resolution; {_SUPPORTED}")
    if "visual.attn_pool.probe" in state and "visual.class_embedding" not in state:
        raise WeightsError(f"{path} is a PE-Core G, without a class token; {_SUPPORTED}")


def _checksum(state: StateDict, about: str) -> str:
    """CRC-32 of the tensors, and of the configuration and origin; safetensors has no checksum."""
    crc32 = zlib.crc32(about.encode())
    for name, tensor in sorted(state.items()):
        crc32 = zlib.crc32(f"{name} {tensor.dtype} {tensor.shape}".encode(), crc32)
        crc32 = zlib.crc32(np.ascontiguousarray(tensor).data, crc32)
    return str(crc32)


def _stored_config(path: Path, metadata: Mapping[str, str]) -> tuple[Config, str]:
    """The configuration of an exported file, and its step and run in words."""
    try:
        config = config_from_dict(json.loads(metadata[_CONFIG_KEY]))
        if _ORIGIN_KEY not in metadata:
            return config, ""
        origin = json.loads(metadata[_ORIGIN_KEY])
        return config, f", step {origin['step']} of run {origin['run']}"
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise WeightsError(f"{path}: its stored configuration cannot be used: {error}") from error


def save_weights(
    path: Path,
    params: Params,
    config: Config,
    *,
    dtype: str = "float32",
    clip_only: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Writes safetensors atomically under the reference's names, with the configuration.

    Args:
      path: of the file.
      params: parameters of the model.
      config: its configuration.
      dtype: "float32" or "float16", of the tensors in the file.
      clip_only: write the towers alone, under their publisher's names (SigLIP: Hugging Face's), as
        a model with the interaction dp and without temporal head.
      origin: the "step" and "run" that the parameters are of, and what else identifies them, as
        JSON values; None if they are of no run.

    Raises:
      WeightsError: a parameter is too large for float16.
      Unavailable: the file cannot be written.
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
        if config.model.backbone.family == "siglip":
            state = siglip_to_hugging_face(state)
    for name, tensor in state.items():
        if dtype == "float16" and np.abs(tensor).max() > np.finfo(dtype).max:
            raise WeightsError(f"{name} is too large for float16; use float32")
        state[name] = np.ascontiguousarray(tensor, dtype) if tensor.ndim else tensor.astype(dtype)
    about = {_CONFIG_KEY: json.dumps(dataclasses.asdict(config))}
    if origin is not None:
        about[_ORIGIN_KEY] = json.dumps(origin)
    checksum = _checksum(state, "".join(about.values()))
    metadata = {"format": "pt", **about, _CHECKSUM_KEY: checksum}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            save_file(state, unfinished, metadata=metadata)
    except OSError as error:
        raise Unavailable(path, error, "written") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} cannot be written: {one_line(error)}") from error


def state_dict_from_params(params: Params) -> StateDict:
    """Converts parameters to a state dict under the reference's names, float32."""
    leaves = jax.tree.leaves(params)
    return {
        name: np.ascontiguousarray(tensor) if tensor.ndim else tensor
        for entry, leaf in zip(entries(params), leaves, strict=True)
        for name, tensor in zip(entry.names, entry.to_reference(np.asarray(leaf)), strict=True)
    }
