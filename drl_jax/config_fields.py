"""Builds a Config from nested dicts, and checks the values that no model family has a say in."""

import dataclasses
import math
import operator
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from drl_jax.config import (
    ACTIVATIONS,
    ADDED_BACKBONE_FIELDS,
    ATTENTION,
    CACHES,
    CONTRASTIVE,
    DTYPES,
    INTERPOLATIONS,
    REMAT,
    RESIZES,
    STORAGE_ENCODINGS,
    TEXT_CLEANINGS,
    BackboneConfig,
    Config,
    ConfigError,
    LossConfig,
    ModelConfig,
    TrainConfig,
)

# With BertAdam, a learning rate of 1 moves every weight by up to 1 a step.
_MAX_LR = 1.0
# Fields of BackboneConfig that may be 0.
_ZERO_IS_VALID = ("vision_mlp_width", "text_mlp_width", "pad_id")


def config_from_fields(values: Mapping[str, Any]) -> Config:
    """Builds a Config and checks the values that do not depend on a model family.

    `models.drl.config_from_dict` checks the rest; use it unless the model is not needed.

    Args:
      values: nested dict, as `dataclasses.asdict` returns it, also of an earlier version.

    Raises:
      ConfigError: an unknown or missing field, a wrong type, or a value that cannot work.
    """
    if isinstance(values, Mapping):
        values = _with_new_fields(values)
    config = _from_dict(Config, values, "config")
    _check_values(config)
    return config


def _with_new_fields(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reads configurations of earlier versions.

    They lack the fields that are added here, and `model.remat` is a bool.
    """
    model, train, loss = values.get("model"), values.get("train"), values.get("loss")
    if isinstance(train, Mapping):
        fields = {name: getattr(TrainConfig, name) for name in ("skip_nonfinite", "pictures")}
        values = {**values, "train": {**fields, **train}}
    if isinstance(loss, Mapping):
        values = {**values, "loss": {"contrastive": LossConfig.contrastive, **loss}}
    if isinstance(model, Mapping):
        added = ("attention", "release", "tokenizer")
        model = {**{name: getattr(ModelConfig, name) for name in added}, **model}
        if isinstance(backbone := model.get("backbone"), Mapping):
            fields = {name: getattr(BackboneConfig, name) for name in ADDED_BACKBONE_FIELDS}
            model["backbone"] = {**fields, **backbone}
        if isinstance(remat := model.get("remat"), bool):
            model["remat"] = "full" if remat else "none"
        values = {**values, "model": model}
    return values


def _from_dict(cls: type, values: Mapping[str, Any], where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a group of fields, not {values!r}")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(f"{where} has no field {unknown[0]!r}; it has {', '.join(fields)}")
    if missing := sorted(set(fields) - set(values)):
        raise ConfigError(f"{where}.{missing[0]} is missing")
    return cls(**{name: _typed(fields[name], values[name], f"{where}.{name}") for name in fields})


def _typed(expected: type, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(expected):
        return _from_dict(expected, value, where)
    if typing.get_origin(expected) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a tuple, not {value!r}")
        item = typing.get_args(expected)[0]
        return tuple(_typed(item, part, f"{where}[{i}]") for i, part in enumerate(value))
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise ConfigError(f"{where} must be {expected.__name__}, not {value!r}")
    if expected is float and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, not {value}")
    return value


def _check_values(config: Config) -> None:
    model, data, train, optim = config.model, config.data, config.train, config.optim
    _check_choices(config)
    for where, value in _positive_fields(config):
        if value <= 0:
            raise ConfigError(f"{where} must be positive, not {value}")
    checks = (
        (0 <= model.cross_dropout < 1, "model.cross_dropout must be in [0, 1)"),
        (model.similarity_block >= 0, "model.similarity_block must be 0 (all videos) or positive"),
        (
            train.microbatch >= 0
            and (not train.microbatch or train.batch_size % train.microbatch == 0),
            f"train.microbatch={train.microbatch} must divide train.batch_size={train.batch_size}"
            " (or be 0)",
        ),
        (
            train.batch_size > 1 or config.loss.contrastive != "softmax",
            "train.batch_size=1 leaves the softmax loss no other pair to compare with: choose at"
            " least 2, or --config.loss.contrastive=sigmoid",
        ),
        (data.num_threads >= 0, "data.num_threads must be 0 (chosen) or a number of threads"),
        *(
            (getattr(model.backbone, name) >= 0, f"model.backbone.{name} must be 0 or positive")
            for name in _ZERO_IS_VALID
        ),
        *(
            (
                len(getattr(model.backbone, name)) == 3,
                f"model.backbone.{name} must have three numbers, of red, green and blue",
            )
            for name in ("pixel_mean", "pixel_std")
        ),
        (
            bool(model.init) or not model.release,
            f"model.release={model.release} describes model.init, which is empty",
        ),
        (model.position_std >= 0, "model.position_std must be 0 or positive"),
        (data.holdout >= 0, "data.holdout must be 0 (none) or a number of videos"),
        (
            bool(data.val_split) != bool(data.holdout),
            "set one of data.val_split (a stored split) and data.holdout (a number of training"
            " videos): training evaluates on it after each epoch",
        ),
        (train.epochs >= 0, "train.epochs must be 0 (no training) or positive"),
        (train.checkpoint_every >= 0, "train.checkpoint_every must be 0 (off) or positive"),
        (train.skip_nonfinite >= 0, "train.skip_nonfinite must be 0 (none) or a number of batches"),
        (0 <= optim.warmup_proportion < 1, "optim.warmup_proportion must be in [0, 1)"),
        (
            optim.lr <= _MAX_LR,
            f"optim.lr={optim.lr:g} is above {_MAX_LR:g}",
        ),
        (
            optim.lr * optim.coef_lr <= _MAX_LR,
            f"optim.coef_lr={optim.coef_lr:g} gives the backbone a learning rate above {_MAX_LR:g}",
        ),
        (0 <= optim.b1 < 1, f"optim.b1 must be in [0, 1), not {optim.b1:g}"),
        (0 <= optim.b2 < 1, f"optim.b2 must be in [0, 1), not {optim.b2:g}"),
        (
            optim.weight_decay >= 0 and optim.lr * optim.weight_decay < 1,
            f"optim.weight_decay={optim.weight_decay:g} must be 0 or positive, and below 1 / lr",
        ),
        # Seeds of NumPy and Grain have 32 bits.
        (0 <= config.seed < 2**32, f"seed must be in [0, 2^32), not {config.seed}"),
    )
    for holds, message in checks:
        if not holds:
            raise ConfigError(f"config.{message}")


def _check_choices(config: Config) -> None:
    """Checks the fields that are one of a few names."""
    for group, field, choices in (
        ("model", "dtype", DTYPES),
        ("model", "remat", REMAT),
        ("model", "attention", ATTENTION),
        ("model.backbone", "activation", ACTIVATIONS),
        ("model.backbone", "resize", RESIZES),
        ("model.backbone", "interpolation", INTERPOLATIONS),
        ("model.backbone", "text_cleaning", TEXT_CLEANINGS),
        ("loss", "contrastive", CONTRASTIVE),
        ("data", "cache", CACHES),
        ("data", "storage", STORAGE_ENCODINGS),
    ):
        value = getattr(operator.attrgetter(group)(config), field)
        if value not in choices:
            names = " or ".join(", ".join(choices).rsplit(", ", 1))
            raise ConfigError(f"config.{group}.{field} is {names}, not {value!r}")


def _positive_fields(config: Config) -> Iterator[tuple[str, float]]:
    for field in dataclasses.fields(BackboneConfig):
        if field.type in (int, float) and field.name not in _ZERO_IS_VALID:
            where = f"config.model.backbone.{field.name}"
            yield where, getattr(config.model.backbone, field.name)
    for value in config.model.backbone.pixel_std:
        yield "config.model.backbone.pixel_std", value
    for group, names in {
        "data": ("max_words", "max_frames"),
        "model": ("temporal_layers", "cross_layers", "scan_unroll"),
        "optim": ("lr", "coef_lr", "eps", "max_grad_norm"),
        "train": ("batch_size", "log_every", "keep_checkpoints"),
        "eval": ("batch_size", "text_block"),
    }.items():
        for name in names:
            yield f"config.{group}.{name}", getattr(getattr(config, group), name)
