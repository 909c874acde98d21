"""The tiny CLIP that `configs/shapes.py` starts from, trained from scratch on stills.

`configs/shapes_clip.py:smoke` runs the same steps in seconds, for tests; its results mean nothing.
"""

import dataclasses

from ml_collections import ConfigDict

from data_prep.dataset_config import SHAPES_BACKBONE, data_config
from drl_jax.config import Config, EvalConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig


def get_config(variant: str = "full") -> ConfigDict:
    config = Config(
        data=data_config(
            "shapes_stills",
            train_split="train",
            val_split="val",
            # The captions of a still mean the same.
            expand_captions=False,
            num_threads=2,
            build_if_absent=True,
        ),
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
        eval=EvalConfig(batch_size=64, text_block=64),
    )
    config = ConfigDict(dataclasses.asdict(config))
    if variant == "smoke":
        config.data.data_dir = "data/smoke"
        config.data.build_flags = "--size=smoke"
        config.train.update({"batch_size": 32, "epochs": 2, "log_every": 2})
    elif variant != "full":
        raise ValueError(f"configs/shapes_clip.py has the variant smoke, not {variant!r}")
    return config
