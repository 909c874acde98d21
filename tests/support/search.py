"""Models with random parameters, for search without a run on disk."""

import dataclasses

import jax

from drl_jax.config import Config
from drl_jax.evaluation.embedder import Embedder
from drl_jax.pretrained import RetrievalModel
from drl_jax.sharding import make_layout
from support.params import random_params


def random_model(config: Config, interaction: str) -> RetrievalModel:
    """A model with an interaction; positions are large, so that the order of frames matters."""
    model = dataclasses.replace(config.model, interaction=interaction)
    config = dataclasses.replace(config, model=model)
    layout = make_layout()
    params = jax.device_put(random_params(model, position_std=1.0), layout.replicated)
    embedder = Embedder(config, layout, keep_tokens=True)
    return RetrievalModel(config, params, layout, {"weights": interaction}, "", embedder)
