"""Files of rerankers: safetensors with a checksum, and JSON about what they are of."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from drl_jax.config import Config
from drl_jax.evaluation.reranking import RerankScorer
from drl_jax.models.drl import Params
from drl_jax.models.interactions import Features
from drl_jax.models.reranker import RerankerConfig, first_stage_sha256, reranker_definition
from drl_jax.runs.weights_writer import save_tensors
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import sha256
from drl_jax.weights.containers import open_weights
from drl_jax.weights.errors import WeightsError, about
from drl_jax.weights.weights_file import checksum_of

# Of a run, or beside a file of weights.
RERANKER_FILE = "reranker.safetensors"
_FORMAT = 3
_ABOUT = "drl_jax_reranker"


class RerankerFile(NamedTuple):
    """A reranker, what its file says of it, and the SHA-256 of the file."""

    config: RerankerConfig
    params: Params
    about: dict[str, Any]
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], values: dict[str, Any]) -> None:
    """Replaces a file by tensors and values of JSON; Unavailable: it cannot be written."""
    said = json.dumps(values)
    state = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    # One entry: safetensors writes several in any order.
    sealed = {"format": _FORMAT, "crc32": checksum_of(state, said), "values": said}
    save_tensors(path, state, {_ABOUT: json.dumps(sealed)}, durable=True)


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
        try:
            sealed = json.loads(said)
            if sealed["format"] != _FORMAT:
                raise WeightsError("is of another version: delete it, and run drl_jax.rerank")
            is_intact = sealed["crc32"] == checksum_of(contents.tensors, sealed["values"])
        except (ValueError, TypeError, LookupError):
            is_intact = False
        if not is_intact:
            raise WeightsError("is damaged: delete it, and run drl_jax.rerank")
        tensors = {name: np.asarray(tensor) for name, tensor in contents.tensors.items()}
        return tensors, json.loads(sealed["values"])


def save_reranker(
    path: Path, config: RerankerConfig, params: Params, values: dict[str, Any]
) -> None:
    """Writes a reranker; `values` have the `first_stage` (`first_stage_sha256`) that it is of."""
    tensors = {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}
    write_tensors(path, tensors, {"sizes": list(config), **values})


def reranker_path(source: Mapping[str, str]) -> Path:
    """Where the reranker of a model is that comes from a run or a file of weights."""
    return Path(source.get("workdir") or Path(source["weights"]).parent) / RERANKER_FILE


def read_reranker(path: Path, config: Config, first_stage: Params) -> RerankerFile:
    """Opens the reranker of a first stage.

    Raises:
      UserError: there is none, it is of another first stage, or of other sizes.
      WeightsError, Unavailable: as of `read_tensors`.
    """
    wanted = RerankerConfig.of(config.model, config.data.max_frames)
    if not path.exists():
        raise UserError(
            f"there is no {path}; train that of a run with python -m drl_jax.rerank, and copy it"
            " beside a file of its weights"
        )
    tensors, values = read_tensors(path)
    if not {"sizes", "first_stage"} <= values.keys() or values.get("variant"):
        raise WeightsError(f"{path} is no complete reranker; train it with drl_jax.rerank")
    if (*values["sizes"],) != wanted:
        raise UserError(
            f"{path} has sizes {values['sizes']} (channels, frames), and the first stage"
            f" {[*wanted]}"
        )
    if (found := first_stage_sha256(first_stage)) != values["first_stage"]:
        raise UserError(
            f"{path} is of another first stage: parameters {values['first_stage'][:12]}, not"
            f" {found[:12]}; it belongs to the best checkpoint that drl_jax.rerank was run with"
        )
    shapes = flatten_dict(reranker_definition(wanted)[1], sep="/")
    if {n: x.shape for n, x in shapes.items()} != {n: x.shape for n, x in tensors.items()}:
        raise WeightsError(f"{path} has other parameters than its sizes say")
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise WeightsError(f"{path} has values that are not finite; train it again")
    return RerankerFile(wanted, unflatten_dict(tensors, sep="/"), values, sha256(path))


class LoadedReranker:
    """The reranker of a first stage, ready to use; errors are those of `read_reranker`."""

    def __init__(self, path: Path, config: Config, first_stage: Params):
        found = read_reranker(path, config, first_stage)
        self.sha256 = found.sha256
        self._scorer, self._params = RerankScorer(found.config), jax.device_put(found.params)

    def changes(self, text: Features, video: Features) -> np.ndarray:
        """Arrays of A texts and B videos -> changes of their similarities, float32 [A, B]."""
        return self._scorer.changes(self._params, text, video)

    def explain(self, text: Features, video: Features) -> tuple[np.ndarray, np.ndarray]:
        """As `RerankScorer.explain`, of a video without an axis of items."""
        video = {name: array[None] for name, array in video.items()}
        return self._scorer.explain(self._params, text, video)
