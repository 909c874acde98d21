"""The embedded dataset: a tiny DRL trained from scratch on drawn clips, in minutes on two cores.

`configs/shapes.py:smoke` runs the same steps in seconds, for tests; its results mean nothing.
"""

import dataclasses

from ml_collections import ConfigDict

from data_prep.dataset_config import data_config
from data_prep.datasets import builder_class
from drl_jax.config import (
    BackboneConfig,
    Config,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

_BACKBONE = BackboneConfig(
    embed_dim=64,
    image_resolution=builder_class("shapes").DEFAULT_STORAGE.image_size,
    vision_layers=3,
    vision_width=64,
    vision_heads=2,
    vision_patch_size=16,
    text_width=64,
    text_heads=4,
    text_layers=3,
)


def get_config(variant: str = "full") -> ConfigDict:
    config = Config(
        data=data_config(
            "shapes",
            train_split="train",
            val_split="val",
            # The 20 captions of a clip mean the same.
            expand_captions=False,
            num_threads=2,
            build_if_absent=True,
        ),
        model=ModelConfig(backbone=_BACKBONE, position_std=0.8, scan_unroll=4),
        # Nothing is pretrained: all parameters have the same learning rate.
        optim=OptimConfig(lr=1.5e-3, coef_lr=1.0),
        train=TrainConfig(batch_size=96, epochs=16, checkpoint_every=0),
        eval=EvalConfig(batch_size=64, text_block=64),
    )
    config = ConfigDict(dataclasses.asdict(config))
    if variant == "smoke":
        config.data.data_dir = "data/smoke"
        config.data.build_flags = "--size=smoke"
        config.train.update({"batch_size": 32, "epochs": 2, "log_every": 2})
    elif variant != "full":
        raise ValueError(f"configs/shapes.py has the variant smoke, not {variant!r}")
    return config
