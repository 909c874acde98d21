"""The configuration as frozen dataclasses. Defaults are the reference's.

`ml_collections` is used at the entry points only: a file under `configs/` returns
`ConfigDict(asdict(Config(...)))`, and `models.drl.config_from_dict` builds a checked Config from
it.
"""

import dataclasses
import math
import operator
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from drl_jax.runtime.errors import UserError

# Encodings of stored frames: JPEG (quality 95, 4:4:4) or exact pixels.
STORAGE_ENCODINGS = ("jpeg", "raw")
# Caches of frames: `DataConfig.cache`.
CACHES = ("auto", "none", "memory", "device")
# Dtypes of matrix products: `ModelConfig.dtype`.
DTYPES = ("float32", "bfloat16")
# What is kept of a transformer layer for the backward pass: `ModelConfig.remat`.
REMAT = ("none", "dots", "full")
# What computes attention: `ModelConfig.attention`.
ATTENTION = ("auto", "xla")
# Activations of the towers' MLPs.
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
# Fields of BackboneConfig that may be 0.
_ZERO_IS_VALID = ("vision_mlp_width", "text_mlp_width", "pad_id")
# How an image becomes a square, and how it is resampled.
RESIZES = ("crop", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")
# How a caption is cleaned before it is tokenised.
TEXT_CLEANINGS = ("clip", "none", "lower", "canonicalize")
# Contrastive losses.
CONTRASTIVE = ("softmax", "sigmoid")
# With BertAdam, a learning rate of 1 moves every weight by up to 1 a step.
_MAX_LR = 1.0


class ConfigError(UserError):
    """A configuration that cannot work; the message names the field and what to do."""


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Family and sizes of the image and the text tower; the defaults are OpenAI's CLIP ViT-B/32.

    A file of weights replaces all of it (`ModelConfig.init`).
    """

    # clip (OpenAI, open_clip), siglip (SigLIP and SigLIP 2) or pe (Perception Encoder).
    family: str = "clip"
    embed_dim: int = 512
    image_resolution: int = 224
    vision_layers: int = 12
    vision_width: int = 768
    vision_heads: int = 12
    vision_patch_size: int = 32
    # Positions of the text tower.
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_heads: int = 8
    text_layers: int = 12
    # Hidden widths of the MLPs. 0: four times the width.
    vision_mlp_width: int = 0
    text_mlp_width: int = 0
    # One of ACTIVATIONS.
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    # Whether there is a learned bias of the logits beside their scale (`LossConfig.contrastive`).
    logit_bias: bool = False
    # Mean and standard deviation of pixels, RGB in [0, 1].
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    # crop: the short side becomes image_resolution, and the centre is cut out. squash: both sides
    # become image_resolution.
    resize: str = "crop"
    # One of INTERPOLATIONS.
    interpolation: str = "bicubic"
    # One of TEXT_CLEANINGS. clip: as OpenAI's tokenizer. lower: lower case. canonicalize: lower
    # case, without punctuation.
    text_cleaning: str = "clip"
    # Token id that a text tower without causal mask sees after the caption.
    pad_id: int = 0

    @property
    def vision_hidden_width(self) -> int:
        """Hidden width of the image tower's MLPs."""
        return self.vision_mlp_width or 4 * self.vision_width

    @property
    def text_hidden_width(self) -> int:
        """Hidden width of the text tower's MLPs."""
        return self.text_mlp_width or 4 * self.text_width

    def identity(self) -> dict[str, Any]:
        """The fields that features depend on, by name.

        Fields that version 0.2 did not have are left out where they have the default, so that
        features made with it keep their fingerprint.
        """
        default = BackboneConfig()
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _ADDED_BACKBONE_FIELDS or value != getattr(default, name)
        }


# Fields of BackboneConfig that version 0.2 did not have.
_ADDED_BACKBONE_FIELDS = (
    "vision_mlp_width",
    "text_mlp_width",
    "activation",
    "layer_norm_eps",
    "logit_bias",
    "pixel_mean",
    "pixel_std",
    "resize",
    "interpolation",
    "text_cleaning",
    "pad_id",
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    backbone: BackboneConfig = BackboneConfig()
    # Initial weights: a file of towers (docs/weights.md has the table) or of a DRL checkpoint,
    # `hf-hub:ORG/NAME`, or the name of weights that are installed with this package
    # (`shapes_clip`). Their description replaces `backbone` if it is the default one. Empty: random
    # initialisation.
    init: str = ""
    # Name of the release that `init` is of (`weights.releases.RELEASES`), for a file that does not
    # say its activation and has no description beside it. Empty: the file says it.
    release: str = ""
    # Tokenizer: a `tokenizer.json` or a `spiece.model`. Empty: the one beside `init`, or CLIP's.
    tokenizer: str = ""
    # How texts and videos are compared: dp (dot product), ti (token-wise), wti (weighted
    # token-wise) or xti (cross transformer).
    interaction: str = "wti"
    # Linear layers of wti's weights: 1, 2 or 3.
    wti_arch: int = 2
    # Temporal aggregation of frame features: none, seqLSTM or seqTransf.
    agg_module: str = "seqTransf"
    # Layers of seqTransf.
    temporal_layers: int = 4
    # Layers of xti's cross transformer, and the dropout of its input.
    cross_layers: int = 4
    cross_dropout: float = 0.1
    # Standard deviation of new position embeddings of patches and frames. 0: patches use OpenAI's
    # width**-0.5 and frames copy the text tower's, as in the reference. Small models learn
    # places and the order of frames faster with larger values (docs/benchmarks.md).
    position_std: float = 0.0
    # Dtype of the transformers' matrix products: float32 or bfloat16. Parameters, norms, softmax,
    # features, similarities and losses are float32 in both cases.
    dtype: str = "float32"
    # What the backward pass computes again, one of REMAT: none keeps everything, dots keeps the
    # matrix products and computes norms, activations and attention weights again, full keeps the
    # input of each transformer layer only, and computes a third more.
    remat: str = "dots"
    # What computes attention, one of ATTENTION: auto takes cuDNN's kernel on an NVIDIA GPU if
    # `dtype` is bfloat16, and XLA otherwise.
    attention: str = "auto"
    # Layers per iteration of lax.scan. More take longer to compile; measure before changing it.
    scan_unroll: int = 1
    # Videos compared with all texts at a time; bounds the memory of the token-wise product, which
    # is recomputed in the backward pass. 0: all videos.
    similarity_block: int = 128


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Contrastive loss and channel decorrelation (CDCR)."""

    # softmax: symmetric InfoNCE, as in the paper. sigmoid: SigLIP's loss of independent pairs.
    contrastive: str = "softmax"
    # 0: none. 1: sentence and video vectors (dp), or a random token and frame of each pair (ti,
    # wti). 2: every token and frame with its best match. 3: as 2, weighted (wti).
    cdcr: int = 3
    # cdcr_alpha1 weights matched channels, cdcr_alpha2 all other pairs of channels.
    cdcr_alpha1: float = 0.11
    cdcr_alpha2: float = 0.0
    cdcr_lambda: float = 0.001


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """BertAdam: Adam without bias correction, decoupled decay multiplied by the learning rate."""

    lr: float = 1e-4
    # The learning rate of the backbone is lr * coef_lr.
    coef_lr: float = 1e-3
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup_proportion: float = 0.1
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    dataset: str = "msrvtt"
    # Directory of built datasets.
    data_dir: str = "data"
    train_split: str = "train_9k"
    # Split that is evaluated after each epoch and chooses the best checkpoint. With `holdout`, that
    # many videos of `train_split` are used instead, with one caption each.
    val_split: str = ""
    holdout: int = 0
    test_split: str = "test"
    max_words: int = 32
    max_frames: int = 12
    # Encoding of the stored frames, one of STORAGE_ENCODINGS.
    storage: str = "jpeg"
    # True: every (video, caption) pair is an example, as in the reference. False: every video is an
    # example, with one of its captions drawn at random each time.
    expand_captions: bool = True
    # Threads that read frames ahead of the step. 0: 4 if the CPU also computes the step, and one
    # for each processor beside an accelerator.
    num_threads: int = 0
    # Cache of the training split's frames. none: read from disk each epoch. memory: decoded, in the
    # memory of each process (max_frames x 3 x resolution^2 bytes a video). device: decoded, split
    # over the devices, which gather batches; read before the first step. auto: none if the CPU
    # computes the step; beside an accelerator, device if the frames take at most 30 % of the
    # devices' memory, or else memory if they take at most 30 % of the host's.
    cache: str = "auto"
    # Build the dataset if it is absent. Only `shapes` and `shapes_stills` need no source files.
    build_if_absent: bool = False
    # Flags of that build, e.g. "--size=smoke".
    build_flags: str = ""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    # Pairs of the global batch, over all devices.
    batch_size: int = 128
    # Pairs encoded at a time, over all devices; the backward pass encodes them again. Loss and
    # gradient are those of the whole batch. 0: the whole batch at once.
    microbatch: int = 0
    # 0: no training; tests the weights of `model.init`.
    epochs: int = 5
    log_every: int = 20
    # Steps between checkpoints within an epoch (0: only at its end).
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    # Batches whose loss or gradient is not finite that a run leaves out before it stops.
    skip_nonfinite: int = 0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    # Videos or captions encoded at a time, over all devices.
    batch_size: int = 64
    # Captions compared with all videos at a time, over all devices.
    text_block: int = 256


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    # Split parameters and optimiser state over the devices instead of replicating them.
    fsdp: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    sharding: ShardingConfig = ShardingConfig()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Builds a Config and checks the values that do not depend on a model family.

        `models.drl.config_from_dict` checks the rest; use it unless the model is not needed.

        Args:
          values: nested dict, as `dataclasses.asdict` returns it.

        Raises:
          ConfigError: an unknown or missing field, a wrong type, or a value that cannot work.
        """
        if isinstance(values, Mapping):
            values = _with_new_fields(_with_backbone_group(values))
        config = _from_dict(cls, values, "config")
        _check_values(config)
        return config


def _with_backbone_group(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reads configurations of version 0.1, where `model.backbone` was `model.clip`."""
    model = values.get("model")
    if not isinstance(model, Mapping) or "clip" not in model or "backbone" in model:
        return values
    model = dict(model)
    model["backbone"] = {"family": "clip", **model.pop("clip")}
    return {**values, "model": model}


def _with_new_fields(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reads configurations of earlier versions.

    They lack the fields that are added here, and `model.remat` is a bool.
    """
    model, train, loss = values.get("model"), values.get("train"), values.get("loss")
    if isinstance(train, Mapping):
        values = {**values, "train": {"skip_nonfinite": 0, **train}}
    if isinstance(loss, Mapping):
        values = {**values, "loss": {"contrastive": LossConfig.contrastive, **loss}}
    if isinstance(model, Mapping):
        added = ("attention", "release", "tokenizer")
        model = {**{name: getattr(ModelConfig, name) for name in added}, **model}
        if isinstance(backbone := model.get("backbone"), Mapping):
            fields = {name: getattr(BackboneConfig, name) for name in _ADDED_BACKBONE_FIELDS}
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
