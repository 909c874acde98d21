"""Files of rerankers: safetensors with a checksum, and JSON about what they are of."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from drl_jax.config import ModelConfig
from drl_jax.models.drl import Params
from drl_jax.models.reranker import RerankerConfig, first_stage_sha256, reranker_definition
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.files import replacing, sha256
from drl_jax.weights.containers import open_weights
from drl_jax.weights.errors import WeightsError, about
from drl_jax.weights.weights_file import checksum_of

# Of a run, or beside a file of weights.
RERANKER_FILE = "reranker.safetensors"
_FORMAT = 2
_ABOUT, _CHECKSUM = "drl_jax_reranker", "drl_jax_crc32"


class RerankerFile(NamedTuple):
    """A reranker, what its file says of it, and the SHA-256 of the file."""

    config: RerankerConfig
    params: Params
    about: dict[str, Any]
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], values: dict[str, Any]) -> None:
    """Replaces a file by tensors and values of JSON, all at once; Unavailable: it cannot."""
    said = json.dumps({"format": _FORMAT, **values})
    state = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    metadata = {_ABOUT: said, _CHECKSUM: checksum_of(state, said)}
    try:
        with replacing(path, durable=True) as unfinished:
            save_file(state, unfinished, metadata=metadata)
    except OSError as error:
        raise Unavailable(path, error, "written") from error


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
      WeightsError: the file is damaged, or another one.
      Unavailable: it cannot be read.
    """
    contents = open_weights(path)
    with about(path):
        said = contents.metadata.get(_ABOUT)
        if said is None:
            raise WeightsError("is no reranker of drl_jax")
        if contents.metadata.get(_CHECKSUM) != checksum_of(contents.tensors, said):
            raise WeightsError("is damaged: its checksum is wrong")
        values = json.loads(said)
        if values.pop("format") != _FORMAT:
            raise WeightsError("is of another version: train it with drl_jax.rerank again")
        return {name: np.asarray(tensor) for name, tensor in contents.tensors.items()}, values


def save_reranker(
    path: Path, config: RerankerConfig, params: Params, values: dict[str, Any]
) -> None:
    """Writes a reranker; `values` have the `first_stage` (`first_stage_sha256`) that it is of."""
    tensors = {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}
    write_tensors(path, tensors, {"sizes": list(config), **values})


def reranker_path(source: Mapping[str, str]) -> Path:
    """Where the reranker of a model is that comes from a run or a file of weights."""
    return Path(source.get("workdir") or Path(source["weights"]).parent) / RERANKER_FILE


def read_reranker(path: Path, model: ModelConfig, first_stage: Params) -> RerankerFile:
    """Opens the reranker of a first stage.

    Raises:
      UserError: there is none, it is of another first stage, or of another width.
      WeightsError, Unavailable: as of `read_tensors`.
    """
    RerankerConfig.of(model, 0)  # A first stage that can have one.
    if not path.exists():
        raise UserError(f"there is no {path}; train it with python -m drl_jax.rerank --workdir=RUN")
    tensors, values = read_tensors(path)
    config = RerankerConfig(*values["sizes"])
    wanted = RerankerConfig.of(model, config.frames)
    if config != wanted:
        raise UserError(
            f"{path} is of features with {config.width} channels; those of the first stage have"
            f" {wanted.width}"
        )
    if (found := first_stage_sha256(first_stage)) != values["first_stage"]:
        raise UserError(
            f"{path} is of another first stage: parameters {values['first_stage'][:12]}, not"
            f" {found[:12]}; train it with python -m drl_jax.rerank again"
        )
    shapes = flatten_dict(reranker_definition(config)[1], sep="/")
    if {n: x.shape for n, x in shapes.items()} != {n: x.shape for n, x in tensors.items()}:
        raise WeightsError(f"{path} has other parameters than its sizes say")
    return RerankerFile(config, unflatten_dict(tensors, sep="/"), values, sha256(path))
