"""Writes files of weights, and what lies beside them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from drl_jax.config import Config, LoRAConfig
from drl_jax.models.drl import Params
from drl_jax.models.linear import merge_adapters
from drl_jax.models.reference_names import state_dict_from_params, to_publisher
from drl_jax.models.tokenizers import stored_name
from drl_jax.runtime.errors import Unavailable, UserError, one_line
from drl_jax.runtime.files import copy_once, replacing
from drl_jax.weights.errors import WeightsError
from drl_jax.weights.families import FAMILIES
from drl_jax.weights.weights_file import CHECKSUM_KEY, CONFIG_KEY, ORIGIN_KEY, checksum_of


def merged(config: Config, params: Params) -> tuple[Config, Params]:
    """A model whose kernels have their adapters added; it has none then."""
    if not config.model.lora.rank:
        return config, params
    model = dataclasses.replace(config.model, lora=LoRAConfig())
    params = merge_adapters(params, config.model.lora.scale)
    return dataclasses.replace(config, model=model), params


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
      path, params, config: of the file; of the model.
      dtype: "float32" or "float16", of the tensors in the file.
      clip_only: write the towers alone, under their publisher's names (SigLIP: Hugging Face's), as
        a model with the interaction dp and without temporal head.
      origin: the "step" and "run" that the parameters are of, and what else identifies them, as
        JSON values; None if they are of no run.

    Raises:
      WeightsError: a parameter is too large for float16.
      Unavailable: the file cannot be written.
    """
    state = state_dict_from_params({"backbone": params["backbone"]} if clip_only else params)
    if clip_only:
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, interaction="dp", agg_module="none"),
            loss=dataclasses.replace(config.loss, cdcr=0),
        )
        state = {name.removeprefix("clip."): tensor for name, tensor in state.items()}
        if names := FAMILIES[config.model.backbone.family].export:
            state = to_publisher(state, names)
    for name, tensor in state.items():
        if dtype == "float16" and np.abs(tensor).max() > np.finfo(dtype).max:
            raise WeightsError(f"{name} is too large for float16; use float32")
        state[name] = np.ascontiguousarray(tensor, dtype) if tensor.ndim else tensor.astype(dtype)
    said = {CONFIG_KEY: json.dumps(dataclasses.asdict(config))}
    if origin is not None:
        said[ORIGIN_KEY] = json.dumps(origin)
    checksum = checksum_of(state, "".join(said.values()))
    metadata = {"format": "pt", **said, CHECKSUM_KEY: checksum}
    save_tensors(path, state, metadata)


def save_tensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: dict[str, str],
    *,
    durable: bool = False,
) -> None:
    """Replaces a safetensors file, all at once; Unavailable: it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=durable) as unfinished:
            save_file(dict(tensors), unfinished, metadata=metadata)
    except OSError as error:
        raise Unavailable(path, error, "written") from error
    except SafetensorError as error:  # Of a full disk, too.
        raise Unavailable(path, OSError(one_line(error)), "written") from error


def write_tokenizer(tokenizer: Path, target: Path) -> str:
    """Copies a tokenizer beside a file of weights, and returns its name there."""
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
