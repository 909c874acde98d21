"""MSR-VTT 1k-A, ViT-B/32, WTI + CDCR: the reference's README command.

Build the dataset first: python -m data_prep.build msrvtt --videos=DIR --annotations=DIR
"""

import dataclasses

from ml_collections import ConfigDict

from drl_jax.config import (
    ClipConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


def get_config() -> ConfigDict:
    config = Config(
        data=DataConfig(
            dataset="msrvtt",
            train_split="train_9k",
            # 1k-A has no val. The reference picks its best epoch on the test split; here it is
            # picked on videos kept out of training. `--config.data.holdout=0
            # --config.data.val_split=test` is the reference's way.
            holdout=500,
            max_words=32,
            max_frames=12,
        ),
        model=ModelConfig(clip=ClipConfig()),
        loss=LossConfig(cdcr_alpha1=0.11, cdcr_alpha2=0.0, cdcr_lambda=0.001),
        optim=OptimConfig(lr=1e-4, coef_lr=1e-3),
        train=TrainConfig(batch_size=128, epochs=5),
    )
    return ConfigDict(dataclasses.asdict(config))
