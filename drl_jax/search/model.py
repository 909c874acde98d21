"""The model that videos are indexed with and that queries are asked of."""

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np

from drl_jax.checkpoint import Checkpoints
from drl_jax.config import Config
from drl_jax.embedding import Embedder
from drl_jax.models.drl import Params
from drl_jax.sharding import Layout, make_layout
from drl_jax.state import abstract_params
from drl_jax.weights.load import config_of_weights, initial_params, read_weights
from drl_jax.workdir import load_config


@dataclasses.dataclass(frozen=True)
class SearchModel:
    """A model, ready to embed.

    Attributes:
      config: its configuration.
      params: its parameters.
      layout: of arrays over the devices.
      embedder: keeps token-level features, whatever the interaction.
      source: where it comes from: "workdir" and "checkpoint", or "weights".
      fingerprint: of configuration and parameters; features of two models with the same one can be
        compared.
    """

    config: Config
    params: Params
    layout: Layout
    embedder: Embedder
    source: dict[str, str]
    fingerprint: str


def from_workdir(workdir: Path, checkpoint: str = "best") -> SearchModel:
    """The model of a run.

    Args:
      workdir: of the run.
      checkpoint: "best", "latest" or a step.

    Raises:
      UserError: no such run or checkpoint.
    """
    config = load_config(workdir)
    layout = make_layout()
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.find_step(checkpoint)
        params = checkpoints.restore_params(step, abstract_params(config.model, layout))
    return _ready(config, params, layout, {"workdir": str(workdir), "checkpoint": str(step)})


def from_weights(path: Path) -> SearchModel:
    """The model of a file: a whole DRL checkpoint, or CLIP as zero-shot retrieval uses it.

    Raises:
      UserError: the file cannot be read.
    """
    weights = read_weights(path)
    config = config_of_weights(weights)
    layout = make_layout()
    params = initial_params(config.model, weights, jax.random.key(0))
    return _ready(config, jax.device_put(params, layout.whole), layout, {"weights": str(path)})


def from_source(source: dict[str, str]) -> SearchModel:
    """The model that an index says it was made with.

    Raises:
      UserError: it is not there any more.
    """
    if "weights" in source:
        return from_weights(Path(source["weights"]))
    return from_workdir(Path(source["workdir"]), source["checkpoint"])


def _ready(config: Config, params: Params, layout: Layout, source: dict[str, str]) -> SearchModel:
    # What is compared and how wide it is, but not how it is computed.
    model = dataclasses.replace(config.model, init="", remat=False, scan_unroll=1)
    digest = hashlib.sha256(repr((model, config.data.max_frames)).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    embedder = Embedder(config, layout, keep_tokens=True)
    return SearchModel(config, params, layout, embedder, source, digest.hexdigest())
