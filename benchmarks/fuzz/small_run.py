"""A small run with random parameters, for the kinds that need a model."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from drl_jax.config import BackboneConfig, Config, DataConfig, ModelConfig
from drl_jax.models.drl import param_shapes
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.log_files import MetricsFile
from drl_jax.runs.workdir import claim_workdir
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import state_from_params

_BACKBONE = BackboneConfig(
    embed_dim=32,
    image_resolution=32,
    vision_layers=1,
    vision_width=32,
    vision_heads=2,
    vision_patch_size=16,
    text_width=32,
    text_heads=2,
    text_layers=1,
)


def write_run(workdir: Path, vocab_size: int = BackboneConfig.vocab_size) -> None:
    """Writes a run with one evaluated checkpoint, as training does.

    A model that encodes text needs the `vocab_size` of its tokenizer; a small one saves time.
    """
    backbone = dataclasses.replace(_BACKBONE, vocab_size=vocab_size)
    config = Config(
        data=DataConfig(max_words=16, max_frames=4, holdout=1),
        model=ModelConfig(backbone=backbone, interaction="wti", temporal_layers=1),
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32),
        param_shapes(config.model),
    )
    claim_workdir(workdir, config)
    with Checkpoints(workdir) as checkpoints:
        tx = make_optimizer(config.optim, 1)
        # From one device: Orbax slices an array for each of several devices.
        checkpoints.save(state_from_params(params, tx, make_layout(jax.devices()[:1])))
        checkpoints.attach_metric(0, 12.5)
    log = MetricsFile(workdir)
    for step in range(1, 6):
        log.write_scalars(step, {"train/loss": 1 / step, "eval/t2v_R1": step})
