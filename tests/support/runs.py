"""Runs with random parameters."""

import dataclasses
from pathlib import Path

import jax

from drl_jax.config import Config
from drl_jax.models.drl import config_from_dict
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.workdir import claim_workdir
from drl_jax.runtime.cli import Parser, add_config_flag, parse_with_config
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import state_from_params
from support.commands import ROOT, TINY
from support.params import random_params


def tiny_shapes_config() -> Config:
    """The configuration of `configs/shapes.py:smoke` with the flags TINY."""
    parser = Parser("tests")
    add_config_flag(parser)
    arguments = [f"--config={ROOT / 'configs' / 'shapes.py'}:smoke", *TINY]
    return config_from_dict(parse_with_config(parser, arguments)[1].to_dict())


def make_run(workdir: Path, config: Config, interaction: str = "wti", *, seed: int = 3) -> Config:
    """Creates a run with a checkpoint of random parameters.

    Position embeddings are large, so that the order of frames matters.
    """
    model = dataclasses.replace(config.model, interaction=interaction)
    loss = dataclasses.replace(config.loss, cdcr=0)
    config = dataclasses.replace(config, model=model, loss=loss)
    claim_workdir(workdir, config)
    with Checkpoints(workdir) as checkpoints:
        tx = make_optimizer(config.optim, 1)
        params = random_params(model, seed=seed, position_std=1.0)
        # Saved from one device: Orbax slices an array for each of several devices.
        checkpoints.save(state_from_params(params, tx, make_layout(jax.devices()[:1])))
    return config
