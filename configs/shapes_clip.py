"""The small CLIP that `configs/shapes.py` starts from, trained from scratch on stills.

`configs/shapes_clip.py:smoke` runs the same steps in seconds, for tests; its results mean nothing.
"""

from ml_collections import ConfigDict

from data_prep.dataset_config import SHAPES_BACKBONE, drawn_dataset_config
from drl_jax.config import LossConfig, ModelConfig, OptimConfig, TrainConfig


def get_config(variant: str = "full") -> ConfigDict:
    if variant not in ("full", "smoke"):
        raise ValueError(f"configs/shapes_clip.py has the variant smoke, not {variant!r}")
    return drawn_dataset_config(
        "shapes_stills",
        model=ModelConfig(
            backbone=SHAPES_BACKBONE,
            interaction="dp",
            agg_module="none",
            position_std=0.8,
            scan_unroll=4,
        ),
        loss=LossConfig(cdcr=0),
        # Nothing is pretrained: all parameters have the same learning rate.
        optim=OptimConfig(lr=2e-3, coef_lr=1.0),
        train=TrainConfig(batch_size=192, epochs=30, checkpoint_every=0),
        smoke=variant == "smoke",
    )
