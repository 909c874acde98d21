"""Configurations of a dataset, derived from its builder."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from data_prep.datasets import builder_class
from drl_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

# The CLIP of `configs/shapes.py` and `configs/shapes_clip.py`.
SHAPES_BACKBONE = BackboneConfig(
    embed_dim=64,
    image_resolution=64,
    vision_layers=3,
    vision_width=64,
    vision_heads=2,
    vision_patch_size=16,
    text_width=64,
    text_heads=4,
    text_layers=2,
)


def finetuning_config(
    dataset: str, *, batch_size: int = TrainConfig.batch_size, **splits: Any
) -> ConfigDict:
    """Makes the configuration that fine-tunes CLIP on a dataset with the reference's recipe.

    It opens what `data_prep.build` writes by default. `splits` is `val_split` or `holdout`;
    all other fields have the defaults of `drl_jax/config.py`.
    """
    form = builder_class(dataset).DEFAULT_STORAGE.form
    backbone = BackboneConfig(
        image_resolution=form.size, resize=form.resize, interpolation=form.interpolation
    )
    config = Config(
        data=data_config(dataset, train_split="train", **splits),
        model=ModelConfig(backbone=backbone),
        train=TrainConfig(batch_size=batch_size),
    )
    return ConfigDict(dataclasses.asdict(config))


def drawn_dataset_config(
    dataset: str,
    *,
    model: ModelConfig,
    loss: LossConfig,
    optim: OptimConfig,
    train: TrainConfig,
    smoke: bool,
) -> ConfigDict:
    """Makes the configuration of a dataset that the build draws, in sizes for a small model.

    With `smoke`, it runs the same steps on a few videos in seconds; the results mean nothing.
    """
    data = data_config(
        dataset,
        train_split="train",
        val_split="val",
        # The captions of a video are variants of one sentence.
        expand_captions=False,
        num_threads=2,
        # A few hundred MB; reading the records takes as long as a step of the small model.
        cache="memory",
        build_if_absent=True,
    )
    evaluation = EvalConfig(batch_size=64, text_block=64)
    config = Config(data=data, model=model, loss=loss, optim=optim, train=train, eval=evaluation)
    config = ConfigDict(dataclasses.asdict(config))
    if smoke:
        config.data.update({"data_dir": "data/smoke", "build_flags": "--size=smoke"})
        config.train.update({"batch_size": 32, "epochs": 2, "log_every": 2})
    return config


def data_config(dataset: str, **fields: Any) -> DataConfig:
    """The DataConfig of a dataset with frames, words and storage of its builder."""
    builder = builder_class(dataset)
    return DataConfig(
        dataset=dataset,
        max_words=builder.MAX_WORDS,
        max_frames=builder.DEFAULT_STORAGE.max_frames,
        storage=builder.DEFAULT_STORAGE.encoding,
        frame_clock=builder.DEFAULT_STORAGE.frame_clock,
        as_shown=builder.DEFAULT_STORAGE.form.as_shown,
        **fields,
    )
