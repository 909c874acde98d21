"""VATEX: ten captions a video, each of them a query.

Weights, and with them the sizes of the towers, are named by `--config.model.init=ViT-B-32.pt`.
"""

import dataclasses

from ml_collections import ConfigDict

from drl_jax.config import Config, DataConfig


def get_config() -> ConfigDict:
    # What is not named here is the reference's recipe: the defaults of `drl_jax/config.py`.
    config = Config(
        data=DataConfig(
            dataset="vatex",
            train_split="train",
            val_split="val",
            max_words=32,
            max_frames=12,
        ),
    )
    return ConfigDict(dataclasses.asdict(config))
