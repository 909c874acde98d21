"""Reads files of weights; names in memory are the reference's."""

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from drl_jax.config import Config
from drl_jax.hub.openai import MODELS
from drl_jax.hub.releases import PUBLISHED, RELEASES
from drl_jax.hub.repository import is_hub_name, resolved_revision
from drl_jax.models.drl import config_from_dict
from drl_jax.models.tokenizers import tokenizer_of_weights
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import sha256
from drl_jax.weights.beside import unknown_model_type
from drl_jax.weights.containers import Contents, open_weights
from drl_jax.weights.description import Description, describe
from drl_jax.weights.errors import WeightsError, about
from drl_jax.weights.families import find_towers
from drl_jax.weights.source import weights_path
from drl_jax.weights.tensors import StateDict, Tensor

# Integers that OpenAI's archives store beside the weights.
_OPENAI_EXTRAS = frozenset(("input_resolution", "context_length", "vocab_size"))
# Keys in the metadata of a safetensors file of `runs.weights_writer.save_weights`.
CONFIG_KEY, ORIGIN_KEY, CHECKSUM_KEY = "drl_jax_config", "drl_jax_origin", "drl_jax_crc32"
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
        """Raises WeightsError if a checksum that the file states is not that of what it holds."""
        if self.contents is not None:
            parts = [part for tensor in self.state.values() for part in tensor.parts]
            for storage in dict.fromkeys(part.storage for part in parts):
                storage.verify()
            verify_export(self.contents)


def verify_export(contents: Contents) -> None:
    """Raises WeightsError if the checksum that `save_weights` wrote is wrong."""
    config, origin, checksum = map(contents.metadata.get, (CONFIG_KEY, ORIGIN_KEY, CHECKSUM_KEY))
    with about(contents.files[0]):
        said = f"{config or ''}{origin or ''}"
        if checksum is not None and checksum != checksum_of(contents.tensors, said):
            raise WeightsError("is damaged: its checksum is wrong; copy or export it again")


def read_weights(source: str | os.PathLike, release: str = "", key: str = "") -> Weights:
    """Opens a file of weights and says what it is; the values are read when they are used.

    Args:
      source: what `weights_path` takes, of towers, a DRL checkpoint, or what `save_weights` wrote.
      release: a name of `releases.RELEASES`, for a CLIP whose activation no description says.
      key: prefix of the towers in a file with several pairs of them.

    Raises:
      WeightsError: the file cannot be read safely, is damaged, or holds no supported towers;
        nothing says their activation, or what says it is contradictory.
      UserError: see `weights_path`.
    """
    if release and release not in RELEASES:
        raise WeightsError(f"the release {release} is unknown; it is one of {', '.join(RELEASES)}")
    path = weights_path(source)
    contents = open_weights(path)
    config, origin, evidence = None, {}, ""
    with about(path):
        if CONFIG_KEY in contents.metadata:
            config, origin = stored_config(contents)
            if "base" in origin:
                raise WeightsError(
                    f"is a LoRA adapter of rank {config.model.lora.rank}, of weights with sha256"
                    f" {origin['base']}; make both a run: python -m drl_jax.convert {path} DIR"
                )
        try:
            tensors = {n: t for n, t in contents.tensors.items() if n not in _OPENAI_EXTRAS}
            found = find_towers(tensors, contents.inert, key)
        except WeightsError as error:
            if of_others := unknown_model_type(path):
                raise WeightsError(of_others) from error
            raise
        is_archive = contents.tensors.keys() >= _OPENAI_EXTRAS
        if config is not None:
            if release:
                raise WeightsError("says what it is; leave the release out")
            evidence = "the file"
            evidence += f", step {origin['step']} of run {origin['run']}" if origin else ""
        elif is_archive and sha256(path) in MODELS.values():
            evidence = "OpenAI's archive (by its sha256)"
            if release not in ("", "openai"):
                raise WeightsError(f"is {evidence}, not of the release {release}; leave that out")
            release = "openai"
        elif is_archive and not release:
            evidence = "OpenAI's archive (by its form)"
        elif found.is_of_drl and not release:
            # The PyTorch original of DRL knows OpenAI's CLIP only.
            evidence = "names of tensors as in DRL's original"
        stored, tokenizer = config and config.model.backbone, config and config.model.tokenizer
        description = describe(found.family, found.state, path, release, evidence, stored)
        description = description._replace(
            licence=description.licence or _LICENCES.get(source, ""),
            revision=resolved_revision(path),
            names=f"names of {found.publisher}, prefix {found.prefix[:-1] or 'none'}",
            notes=found.notes,
        )
        tokenizer = tokenizer_of_weights(path, description.backbone, tokenizer or "")
    state = {f"clip.{name}": tensor for name, tensor in found.state.items()} | found.heads
    return Weights(state, description, config, tokenizer, contents, found.is_of_drl, origin)


def checksum_of(state: StateDict, said: str) -> str:
    """CRC-32 of the tensors, and of the configuration and origin; safetensors has no checksum."""
    crc32 = zlib.crc32(said.encode())
    for name, tensor in sorted(state.items()):
        crc32 = zlib.crc32(f"{name} {tensor.dtype} {tensor.shape}".encode(), crc32)
        if isinstance(tensor, Tensor):
            crc32 = tensor.storage.checksum(crc32)
        else:
            crc32 = zlib.crc32(np.ascontiguousarray(tensor).data, crc32)
    return str(crc32)


def stored_config(contents: Contents) -> tuple[Config, dict[str, Any]]:
    """The configuration of an exported file, and its origin: of a run, with "step" and "run"."""
    try:
        config = config_from_dict(json.loads(contents.metadata[CONFIG_KEY]))
        origin = json.loads(contents.metadata.get(ORIGIN_KEY, "{}"))
        return config, {name: origin[name] for name in ("step", "run") if origin} | origin
    # Python's parser and the checks raise many types for what is not a configuration.
    except (ArithmeticError, RuntimeError, LookupError, ValueError, TypeError, UserError) as error:
        raise WeightsError(f"has a stored configuration that cannot be used: {error}") from error
