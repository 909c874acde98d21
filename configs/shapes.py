"""The embedded default: a tiny DRL from scratch on drawn clips, in minutes on two CPU cores.

`configs/shapes.py:smoke` runs the same road in seconds, for tests; its numbers mean nothing.
"""

import dataclasses

from ml_collections import ConfigDict

from drl_jax.config import (
    ClipConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

_CLIP = ClipConfig(
    embed_dim=64,
    image_resolution=64,
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
        data=DataConfig(
            dataset="shapes",
            train_split="train",
            val_split="val",
            max_words=24,
            max_frames=4,
            storage="raw",
            # The 20 captions of a clip say the same.
            expand_captions=False,
            num_threads=2,
            build_if_absent=True,
        ),
        model=ModelConfig(clip=_CLIP, position_std=0.8, scan_unroll=4),
        # Nothing is pretrained: all parameters learn at the same rate.
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
