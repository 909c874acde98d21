"""Clips whose order, binding and count of events decide between captions: methods differ there.

`configs/shapes_events.py:smoke` runs the same steps in seconds, for tests; its results mean
nothing.
"""

from ml_collections import ConfigDict

from data_prep.dataset_config import SHAPES_BACKBONE, drawn_dataset_config
from drl_jax.config import LossConfig, ModelConfig, OptimConfig, TrainConfig


def get_config(variant: str = "full") -> ConfigDict:
    if variant not in ("full", "smoke"):
        raise ValueError(f"configs/shapes_events.py has the variant smoke, not {variant!r}")
    return drawn_dataset_config(
        "shapes_events",
        model=ModelConfig(
            backbone=SHAPES_BACKBONE, init="shapes_clip", position_std=0.4, scan_unroll=4
        ),
        loss=LossConfig(),
        optim=OptimConfig(lr=3e-3, coef_lr=0.5),
        train=TrainConfig(batch_size=96, epochs=10, checkpoint_every=0),
        smoke=variant == "smoke",
    )
