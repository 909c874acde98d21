"""Reads and writes files of weights; names in memory are the reference's."""

import dataclasses
import json
import os
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
from drl_jax.weights.beside import unknown_model_type
from drl_jax.weights.containers import Contents, crc32_of, open_weights
from drl_jax.weights.description import Description, check_beside, check_release, describe
from drl_jax.weights.download import MODELS
from drl_jax.weights.families import Towers, WeightsError, find_towers, to_publisher
from drl_jax.weights.hub import is_hub_name, resolved_revision
from drl_jax.weights.names import entries
from drl_jax.weights.releases import PUBLISHED
from drl_jax.weights.source import weights_path
from drl_jax.weights.tensors import StateDict, Tensor, WeightsFileError

# Integers that OpenAI's archives store beside the weights.
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# Keys in the metadata of a safetensors file that we write.
_CONFIG_KEY, _ORIGIN_KEY, _CHECKSUM_KEY = "drl_jax_config", "drl_jax_origin", "drl_jax_crc32"


class Weights(NamedTuple):
    """The content of a file of weights.

    Attributes:
      state: tensors under the reference's names (those of the towers with the prefix `clip.`).
      description: of the towers.
      config: the configuration that the file was exported with; None if it does not have one.
      tokenizer: path of the tokenizer beside the file; empty if there is none, or if the towers
        have CLIP's.
      contents: of the file; None if there is none.
      towers: how they are in the file.
    """

    state: StateDict
    description: Description
    config: Config | None = None
    tokenizer: str = ""
    contents: Contents | None = None
    towers: Towers | None = None

    @property
    def has_heads(self) -> bool:
        """Whether the file has DRL heads beside the towers."""
        return any(not name.startswith("clip.") for name in self.state)

    def verify(self) -> None:
        """Compares the checksums of the file with what it holds.

        Raises:
          WeightsFileError: the file is damaged.
          Unavailable: it cannot be read.
        """
        if self.contents is None:
            return
        self.contents.verify(self.state.values())
        metadata, tensors = self.contents.metadata, self.contents.tensors
        stored = metadata.get(_CHECKSUM_KEY)
        about = metadata.get(_CONFIG_KEY, "") + metadata.get(_ORIGIN_KEY, "")
        if stored is not None and stored != _checksum(tensors, about):
            (path,) = self.contents.files
            raise WeightsFileError(
                f"{path} is damaged: its checksum is wrong; copy or export it again"
            )


def read_weights(source: str | os.PathLike, release: str = "", key: str = "") -> Weights:
    """Opens a file of weights and says what it is; the values are read when they are used.

    Args:
      source: what `weights_path` takes: a file that `open_weights` opens or a folder with one, of
        towers, a DRL checkpoint, or what `save_weights` wrote.
      release: a name of `releases.RELEASES`, for a CLIP whose activation no description says.
      key: prefix of the towers in a file with several pairs of them.

    Raises:
      InstalledWeightsError: installed weights are missing or damaged.
      HubError: a repository cannot be used, see `hub.download`.
      WeightsFileError: the file cannot be read safely, or is damaged.
      WeightsError: it does not hold supported towers, nothing says their activation, or what the
        file, the release and a description beside it say is contradictory.
    """
    check_release(release)
    path = weights_path(source)
    contents = open_weights(path)
    try:
        return _described(source, path, contents, release, key)
    except WeightsError as error:
        if str(path.parent) in str(error):
            raise  # Of this file, or of one beside it.
        raise WeightsError(f"{path} {error}") from error


def _described(
    source: str | os.PathLike, path: Path, contents: Contents, release: str, key: str
) -> Weights:
    """The weights in an opened file."""
    metadata, tensors = contents.metadata, dict(contents.tensors)
    # Of the archives that OpenAI published.
    is_archive = all(name in tensors for name in _OPENAI_EXTRAS)
    for name in _OPENAI_EXTRAS:
        tensors.pop(name, None)
    try:
        found = find_towers(tensors, contents.inert, key)
    except WeightsError as error:
        raise WeightsError(unknown_model_type(path) or str(error)) from error
    state = found.state
    towers = {n.removeprefix("clip."): t for n, t in state.items() if n.startswith("clip.")}
    if _CONFIG_KEY in metadata:
        config, origin = _stored_config(path, metadata)
        if release:
            raise WeightsError("says what it is; leave the release out")
        check_beside(path, found.family, towers, config.model.backbone)
        description = Description(config.model.backbone, f"the file{origin}", notes=found.notes)
        tokenizer = tokenizer_of_weights(path, config.model.backbone, config.model.tokenizer)
        return Weights(state, description, config, tokenizer, contents, found)
    is_openais = is_archive and sha256(path) in MODELS.values()
    likeness = ""
    if found.prefix == "clip." and found.form.publisher != "Hugging Face":
        # As checkpoints of the PyTorch original of DRL, which knows OpenAI's CLIP only.
        likeness = "names of tensors as in DRL's original"
    if is_archive:
        likeness = f"OpenAI's archive (by its {'sha256' if is_openais else 'form'})"
    description = describe(
        found.family, towers, path, release=release, likeness=likeness, is_openais=is_openais
    )
    licences = {published.source: published.licence for published in PUBLISHED.values()}
    licence = description.licence or (is_hub_name(source) and licences.get(source)) or ""
    revision = resolved_revision(path) or ""
    description = description._replace(revision=revision, licence=licence, notes=found.notes)
    tokenizer = tokenizer_of_weights(path, description.backbone)
    return Weights(state, description, None, tokenizer, contents, found)


def _checksum(state: StateDict, about: str) -> str:
    """CRC-32 of the tensors, and of the configuration and origin; safetensors has no checksum."""
    crc32 = zlib.crc32(about.encode())
    for name, tensor in sorted(state.items()):
        crc32 = zlib.crc32(f"{name} {tensor.dtype} {tensor.shape}".encode(), crc32)
        if isinstance(tensor, Tensor):
            (span,) = tensor.spans
            crc32 = crc32_of(span.path, span.offset, tensor.size * tensor.dtype.itemsize, crc32)
        else:
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
        state = to_publisher(config.model.backbone.family, state)
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
