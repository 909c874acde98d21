"""The embedded dataset: DRL fine-tunes a small CLIP on drawn clips, in minutes on two cores.

- `configs/shapes.py`: from the installed weights `shapes_clip` (`configs/shapes_clip.py`).
- `configs/shapes.py:scratch`: trains everything from scratch, which depends on the seed.
- `configs/shapes.py:smoke`: the steps of the first in seconds, for tests; its results mean nothing.
"""

from ml_collections import ConfigDict

from data_prep.dataset_config import SHAPES_BACKBONE, drawn_dataset_config
from drl_jax.config import LossConfig, ModelConfig, OptimConfig, TrainConfig


def get_config(variant: str = "full") -> ConfigDict:
    if variant not in ("full", "scratch", "smoke"):
        raise ValueError(f"configs/shapes.py has the variants scratch and smoke, not {variant!r}")
    config = drawn_dataset_config(
        "shapes",
        model=ModelConfig(
            backbone=SHAPES_BACKBONE,
            init="shapes_clip",
            position_std=0.4,
            # The activations of this model are small: nothing has to be computed again.
            remat="none",
            scan_unroll=4,
        ),
        loss=LossConfig(),
        optim=OptimConfig(lr=1.5e-3, coef_lr=0.5),
        train=TrainConfig(batch_size=96, epochs=10, checkpoint_every=0),
        smoke=variant == "smoke",
    )
    if variant == "scratch":
        config.model.update({"init": "", "position_std": 0.8})
        # Nothing is pretrained: all parameters have the same learning rate.
        config.optim.coef_lr = 1.0
        config.train.epochs = 24
    return config
