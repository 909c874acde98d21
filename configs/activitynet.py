"""ActivityNet Captions: a paragraph looks for a whole video.

Weights, and with them the sizes of the towers, are named by `--config.model.init=ViT-B-32.pt`.
"""

import dataclasses

from ml_collections import ConfigDict

from drl_jax.config import Config, DataConfig


def get_config() -> ConfigDict:
    # What is not named here is the reference's recipe: the defaults of `drl_jax/config.py`.
    config = Config(
        data=DataConfig(
            dataset="activitynet",
            train_split="train",
            # val_1 is the field's test split, so that none is left to choose a checkpoint on.
            holdout=500,
            max_words=64,
            max_frames=64,
        ),
    )
    return ConfigDict(dataclasses.asdict(config))
