"""Reads and writes files of weights; names in memory are the reference's."""

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from drl_jax.config import Config, LoRAConfig
from drl_jax.hub.openai import MODELS
from drl_jax.hub.releases import PUBLISHED, RELEASES
from drl_jax.hub.repository import is_hub_name, resolved_revision
from drl_jax.models.drl import Params, config_from_dict
from drl_jax.models.linear import merge_adapters
from drl_jax.models.reference_names import state_dict_from_params
from drl_jax.models.tokenizers import tokenizer_of_weights
from drl_jax.runtime.errors import Unavailable, UserError, one_line
from drl_jax.runtime.files import replacing, sha256
from drl_jax.weights.beside import unknown_model_type
from drl_jax.weights.containers import Contents, crc32_of, open_weights
from drl_jax.weights.description import Description, check_beside, describe
from drl_jax.weights.errors import WeightsError, WeightsFileError, about
from drl_jax.weights.families import Towers, find_towers, sizes_of, to_publisher
from drl_jax.weights.source import weights_path
from drl_jax.weights.tensors import StateDict, Tensor

# Integers that OpenAI's archives store beside the weights.
_OPENAI_EXTRAS = frozenset(("input_resolution", "context_length", "vocab_size"))
# Keys in the metadata of a safetensors file that we write.
_CONFIG_KEY, _ORIGIN_KEY, _CHECKSUM_KEY = "drl_jax_config", "drl_jax_origin", "drl_jax_crc32"
_LICENCES = {p.source: p.licence for p in PUBLISHED.values() if is_hub_name(p.source)}


class Weights(NamedTuple):
    """The content of a file of weights."""

    state: StateDict  # under the reference's names; those of the towers begin with `clip.`
    description: Description
    config: Config | None = None  # that the file was exported with
    tokenizer: str = ""  # path of the one beside the file; empty: none, or the towers have CLIP's
    contents: Contents | None = None  # of the file, if there is one
    is_of_drl: bool = False  # whether it has the names of DRL and CLIP4Clip: `clip.` and heads
    origin: Mapping[str, Any] = {}  # "step" and "run" that it was exported from

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
        spans = [span for tensor in self.state.values() for span in tensor.spans]
        used = {(span.path, span.offset) for span in spans}
        for path, offset, size, expected in self.contents.checksums:
            is_used = any(where == path and offset <= at < offset + size for where, at in used)
            if is_used and crc32_of(path, offset, size) != expected:
                problem = f"{path} is damaged: a checksum is wrong; get it again"
                raise WeightsFileError(problem, names_file=True)
        origin_of(self.contents)


def origin_of(contents: Contents) -> dict[str, Any]:
    """The origin that `save_weights` wrote; WeightsFileError: the checksum of the file is wrong."""
    metadata = contents.metadata
    said = metadata.get(_CONFIG_KEY, "") + metadata.get(_ORIGIN_KEY, "")
    if _CHECKSUM_KEY in metadata and metadata[_CHECKSUM_KEY] != checksum_of(contents.tensors, said):
        problem = "is damaged: its checksum is wrong; copy or export it again"
        raise WeightsFileError(f"{contents.files[0]} {problem}", names_file=True)
    try:
        origin = json.loads(metadata.get(_ORIGIN_KEY, "{}"))
    except ValueError:
        return {}
    return origin if isinstance(origin, dict) else {}


def read_weights(source: str | os.PathLike, release: str = "", key: str = "") -> Weights:
    """Opens a file of weights and says what it is; the values are read when they are used.

    Args:
      source: what `weights_path` takes, of towers, a DRL checkpoint, or what `save_weights` wrote.
      release: a name of `releases.RELEASES`, for a CLIP whose activation no description says.
      key: prefix of the towers in a file with several pairs of them.

    Raises:
      HubError: a repository cannot be used, see `repository.download`.
      WeightsFileError: the file cannot be read safely, or is damaged.
      WeightsError: it does not hold supported towers, nothing says their activation, or what the
        file, the release and a description beside it say is contradictory.
      Unavailable: a file is absent, or cannot be read.
    """
    if release and release not in RELEASES:
        raise WeightsError(f"the release {release} is unknown; it is one of {', '.join(RELEASES)}")
    path = weights_path(source)
    contents = open_weights(path)
    with about(path):
        try:
            tensors = {n: t for n, t in contents.tensors.items() if n not in _OPENAI_EXTRAS}
            found = find_towers(tensors, contents.inert, key)
        except WeightsError as error:
            if of_others := unknown_model_type(path):
                raise WeightsError(of_others) from error
            raise
        config, tokenizer, origin = None, "", {}
        if _CONFIG_KEY in contents.metadata:
            if release:
                raise WeightsError("says what it is; leave the release out")
            config, origin = stored_config(contents.metadata)
            where = f", step {origin['step']} of run {origin['run']}" if origin else ""
            backbone, tokenizer = config.model.backbone, config.model.tokenizer
            layers = sizes_of(found.state)
            if any(layers[name] != getattr(backbone, name) for name in layers if "layers" in name):
                raise WeightsError("has a configuration of other sizes than its tensors")
            check_beside(path, found.state, backbone)
            description = Description(backbone, f"the file{where}")
        else:
            is_archive = contents.tensors.keys() >= _OPENAI_EXTRAS
            release, evidence = _evidence(path, found, release, is_archive)
            description = describe(found.family, found.state, path, release, evidence)
            licence = description.licence or _LICENCES.get(source, "")
            description = description._replace(revision=resolved_revision(path), licence=licence)
        names = f"names of {found.publisher}, prefix {found.prefix[:-1] or 'none'}"
        description = description._replace(names=names, notes=found.notes)
        tokenizer = tokenizer_of_weights(path, description.backbone, tokenizer)
    state = {f"clip.{name}": tensor for name, tensor in found.state.items()} | found.heads
    return Weights(state, description, config, tokenizer, contents, found.is_of_drl, origin)


def _evidence(path: Path, found: Towers, release: str, is_archive: bool) -> tuple[str, str]:
    """The release, and what proves that it is OpenAI's; or none, and what suggests that."""
    if is_archive and sha256(path) in MODELS.values():
        proof = "OpenAI's archive (by its sha256)"
        if release not in ("", "openai"):
            raise WeightsError(f"is {proof}, not of the release {release}; leave that out")
        return "openai", proof
    if release:
        return release, ""
    if is_archive:
        return "", "OpenAI's archive (by its form)"
    # The PyTorch original of DRL knows OpenAI's CLIP only.
    return "", "names of tensors as in DRL's original" if found.is_of_drl else ""


def checksum_of(state: StateDict, about: str) -> str:
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


def stored_config(metadata: Mapping[str, str]) -> tuple[Config, dict[str, Any]]:
    """The configuration of an exported file, and its step and run, if it is of one."""
    try:
        config = config_from_dict(json.loads(metadata[_CONFIG_KEY]))
        origin = json.loads(metadata.get(_ORIGIN_KEY, "{}"))
        return config, {name: origin[name] for name in ("step", "run") if origin}
    # Python's parser and the checks raise many types for what is not a configuration.
    except (ArithmeticError, RuntimeError, LookupError, ValueError, TypeError, UserError) as error:
        raise WeightsError(f"has a stored configuration that cannot be used: {error}") from error


def save_weights(
    path: Path,
    params: Params,
    config: Config,
    *,
    dtype: str = "float32",
    clip_only: bool = False,
    merge: bool = True,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Writes safetensors atomically under the reference's names, with the configuration.

    Args:
      path, params, config: of the file; of the model.
      dtype: "float32" or "float16", of the tensors in the file.
      clip_only: write the towers alone, under their publisher's names (SigLIP: Hugging Face's), as
        a model with the interaction dp and without temporal head.
      merge: add adapters to their kernels, and leave them out.
      origin: the "step" and "run" that the parameters are of, and what else identifies them, as
        JSON values; None if they are of no run.

    Raises:
      WeightsError: a parameter is too large for float16.
      Unavailable: the file cannot be written.
    """
    if merge and config.model.lora.rank:
        params = merge_adapters(params, config.model.lora.scale)
        model = dataclasses.replace(config.model, lora=LoRAConfig())
        config = dataclasses.replace(config, model=model)
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
    said = {_CONFIG_KEY: json.dumps(dataclasses.asdict(config))}
    if origin is not None:
        said[_ORIGIN_KEY] = json.dumps(origin)
    checksum = checksum_of(state, "".join(said.values()))
    metadata = {"format": "pt", **said, _CHECKSUM_KEY: checksum}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            save_file(state, unfinished, metadata=metadata)
    except OSError as error:
        raise Unavailable(path, error, "written") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} cannot be written: {one_line(error)}") from error
