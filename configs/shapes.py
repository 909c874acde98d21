"""The embedded dataset: DRL fine-tunes a small CLIP on drawn clips, in minutes on two cores.

- `configs/shapes.py`: from the installed weights `shapes_clip` (`configs/shapes_clip.py`).
- `configs/shapes.py:scratch`: trains everything from scratch, which depends on the seed.
- `configs/shapes.py:smoke`: the steps of the first in seconds, for tests; its results mean nothing.
"""

import dataclasses

from ml_collections import ConfigDict

from data_prep.dataset_config import SHAPES_BACKBONE, data_config
from drl_jax.config import Config, EvalConfig, ModelConfig, OptimConfig, TrainConfig


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
        model=ModelConfig(
            backbone=SHAPES_BACKBONE, init="shapes_clip", position_std=0.4, scan_unroll=4
        ),
        optim=OptimConfig(lr=1e-3, coef_lr=0.5),
        train=TrainConfig(batch_size=96, epochs=8, checkpoint_every=0),
        eval=EvalConfig(batch_size=64, text_block=64),
    )
    config = ConfigDict(dataclasses.asdict(config))
    if variant == "scratch":
        config.model.update({"init": "", "position_std": 0.8})
        # Nothing is pretrained: all parameters have the same learning rate.
        config.optim.update({"lr": 1.5e-3, "coef_lr": 1.0})
        config.train.epochs = 16
    elif variant == "smoke":
        config.data.data_dir = "data/smoke"
        config.data.build_flags = "--size=smoke"
        config.train.update({"batch_size": 32, "epochs": 2, "log_every": 2})
    elif variant != "full":
        raise ValueError(f"configs/shapes.py has the variants scratch and smoke, not {variant!r}")
    return config
