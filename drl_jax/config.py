"""The configuration as frozen dataclasses. Their defaults are the reference's.

`ml_collections` stops at the entry points: a config file under `configs/` is
`ConfigDict(asdict(Config(...)))`, and `Config.from_dict` makes a Config of what flags left of it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from drl_jax.runtime.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot work; the message says which field and what to do."""


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of the two CLIP towers; the defaults are ViT-B/32."""

    embed_dim: int = 512
    image_resolution: int = 224
    vision_layers: int = 12
    vision_width: int = 768
    vision_heads: int = 12
    vision_patch_size: int = 32
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_heads: int = 8
    text_layers: int = 12


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    clip: ClipConfig = ClipConfig()
    # File of weights to start from: OpenAI's or Hugging Face's CLIP, or a DRL checkpoint. The sizes
    # in `clip` are then the file's. Empty: from scratch.
    init: str = ""
    # How texts and videos are compared: dp (dot product), ti (token-wise), wti (weighted
    # token-wise), xti (cross transformer).
    interaction: str = "wti"
    # Linear layers of wti's weights: 1, 2 or 3.
    wti_arch: int = 2
    # What relates the frames of a video: none, seqLSTM or seqTransf.
    agg_module: str = "seqTransf"
    # Layers of seqTransf, and of xti's cross transformer with the dropout of its input.
    temporal_layers: int = 4
    cross_layers: int = 4
    cross_dropout: float = 0.1
    # Standard deviation of fresh position embeddings of patches and frames. 0: those of patches
    # are OpenAI's (width**-0.5), those of frames a copy of the text tower's, as in the reference.
    # `shapes`, from scratch, uses 0.8: in single trial runs with the frames' copies of 0.01 the
    # order of frames stayed unseen. What it does for patches was not measured on its own.
    position_std: float = 0.0
    # What the transformers compute in: float32 or bfloat16. Parameters, norms, softmax, features,
    # similarities and losses are float32 either way.
    dtype: str = "float32"
    # Keep only the input of each transformer layer for the backward pass and run the layer again
    # there: less memory, a third more work.
    remat: bool = False
    # Layers that lax.scan unrolls in one iteration. More compiles longer; measure before changing.
    scan_unroll: int = 1
    # Videos that all texts are compared with at a time; what is compared is held once for each
    # (text, video, word, frame) of a block, and computed again in the backward pass. 0: all videos.
    similarity_block: int = 128


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Channel decorrelation: alpha1 pulls matched channels together, alpha2 pushes others apart."""

    # 0: none. 1: sentence and video vectors (dp), or a random token and frame of each pair (ti,
    # wti). 2: every token and frame with its best partner. 3: the same, weighted (wti).
    cdcr: int = 3
    cdcr_alpha1: float = 0.11
    cdcr_alpha2: float = 0.0
    cdcr_lambda: float = 0.001


# The CDCR variants that each interaction has.
CDCR_OF = {"dp": (0, 1, 2, 3), "ti": (0, 1, 2), "wti": (0, 1, 2, 3), "xti": (0,)}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """BertAdam: no bias correction, decoupled decay multiplied by the learning rate."""

    lr: float = 1e-4
    # CLIP's parameters learn at lr * coef_lr.
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
    # Where built datasets lie.
    data_dir: str = "data"
    train_split: str = "train_9k"
    # Split for the evaluation of each epoch and the choice of the best one. If `holdout` is set,
    # that many videos are taken out of `train_split` for it instead (one caption each).
    val_split: str = ""
    holdout: int = 0
    test_split: str = "test"
    max_words: int = 32
    max_frames: int = 12
    # How the dataset was stored: "jpeg" (quality 95, 4:4:4) or "raw" (exact).
    storage: str = "jpeg"
    # True: every (video, caption) pair is an example, as in the reference. False: every video is,
    # with one of its captions drawn at random each time.
    expand_captions: bool = True
    # Threads that read frames ahead of the step.
    num_threads: int = 4
    # Where the frames of the training split stay once they were read. none: on disk, read anew each
    # epoch. memory: in each process's memory, decoded (max_frames x 3 x resolution^2 bytes a
    # video). device: the same, split over the accelerators, where batches are gathered; read at
    # the start.
    cache: str = "none"
    # Build the dataset first if it is absent. Only `shapes` needs no source files.
    build_if_absent: bool = False
    # Flags for that build, e.g. "--size=smoke".
    build_flags: str = ""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    # Pairs of the global batch, over all devices.
    batch_size: int = 128
    # Pairs that are encoded at a time, over all devices; the backward pass encodes them again. The
    # loss is that of the whole batch, and so is its gradient. 0: the whole batch at once.
    microbatch: int = 0
    # 0: no training; the test of what `model.init` brings.
    epochs: int = 5
    log_every: int = 20
    # Steps between checkpoints inside an epoch (0: only at its end).
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    # Videos or captions that are embedded at once, over all devices.
    batch_size: int = 64
    # Captions that are compared with all videos at once, over all devices.
    text_block: int = 256


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    # Split parameters and the optimiser's state over the devices instead of copying them to each.
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
        """Builds and validates a Config.

        Args:
          values: nested dict, as `dataclasses.asdict` makes it.

        Raises:
          ConfigError: an unknown or missing field, a wrong type, or values that cannot work.
        """
        config = _from_dict(cls, values, "config")
        _validate(config)
        return config


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
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise ConfigError(f"{where} must be {expected.__name__}, not {value!r}")
    return value


def _validate(config: Config) -> None:
    model, data, train = config.model, config.data, config.train
    clip = model.clip
    for where, value in _positive_fields(config):
        if value <= 0:
            raise ConfigError(f"{where} must be positive, not {value}")
    checks = (
        (
            clip.image_resolution % clip.vision_patch_size == 0,
            "model.clip.image_resolution must be a multiple of model.clip.vision_patch_size",
        ),
        (
            clip.vision_width % clip.vision_heads == 0,
            "model.clip.vision_width must be a multiple of model.clip.vision_heads",
        ),
        (
            clip.text_width % clip.text_heads == 0,
            "model.clip.text_width must be a multiple of model.clip.text_heads",
        ),
        (
            clip.text_width == clip.embed_dim,
            "model.clip.text_width must equal model.clip.embed_dim: the heads start as copies of"
            " the text tower's blocks",
        ),
        (
            model.interaction in CDCR_OF,
            f"model.interaction is dp, ti, wti or xti, not {model.interaction!r}",
        ),
        (
            config.loss.cdcr in CDCR_OF.get(model.interaction, ()),
            f"loss.cdcr={config.loss.cdcr} does not go with model.interaction={model.interaction};"
            f" it takes {', '.join(map(str, CDCR_OF.get(model.interaction, ())))}",
        ),
        (
            model.agg_module in ("none", "seqLSTM", "seqTransf"),
            f"model.agg_module is none, seqLSTM or seqTransf, not {model.agg_module!r}",
        ),
        (model.wti_arch in (1, 2, 3), f"model.wti_arch is 1, 2 or 3, not {model.wti_arch}"),
        (0 <= model.cross_dropout < 1, "model.cross_dropout must lie in [0, 1)"),
        (
            model.interaction != "xti" or clip.embed_dim % 8 == 0,
            "model.clip.embed_dim must be a multiple of xti's 8 heads",
        ),
        (
            3 <= data.max_words <= clip.context_length,
            f"data.max_words must be 3 to model.clip.context_length ({clip.context_length})",
        ),
        (
            data.max_frames < clip.context_length,
            f"data.max_frames must be below model.clip.context_length ({clip.context_length})",
        ),
        (
            model.dtype in ("float32", "bfloat16"),
            f"model.dtype is float32 or bfloat16, not {model.dtype!r}",
        ),
        (model.similarity_block >= 0, "model.similarity_block must be 0 (all videos) or a number"),
        (
            train.microbatch >= 0
            and (not train.microbatch or train.batch_size % train.microbatch == 0),
            f"train.microbatch={train.microbatch} must divide train.batch_size={train.batch_size}"
            " (or be 0)",
        ),
        (
            data.cache in ("none", "memory", "device"),
            f"data.cache is none, memory or device, not {data.cache!r}",
        ),
        (data.storage in ("jpeg", "raw"), f"data.storage is jpeg or raw, not {data.storage!r}"),
        (model.position_std >= 0, "model.position_std must be 0 or more"),
        (data.holdout >= 0, "data.holdout must be 0 (none) or a number of videos"),
        (
            bool(data.val_split) != bool(data.holdout),
            "set one of data.val_split (a stored split) and data.holdout (videos taken out of the"
            " training split): training evaluates on it after each epoch",
        ),
        (train.epochs >= 0, "train.epochs must be 0 (evaluate what init brings) or more"),
        (train.checkpoint_every >= 0, "train.checkpoint_every must be 0 (off) or a step count"),
        (0 <= config.optim.warmup_proportion < 1, "optim.warmup_proportion must lie in [0, 1)"),
    )
    for holds, message in checks:
        if not holds:
            raise ConfigError(f"config.{message}")


def _positive_fields(config: Config):
    for name, value in dataclasses.asdict(config.model.clip).items():
        yield f"config.model.clip.{name}", value
    for group, names in {
        "data": ("max_words", "max_frames", "num_threads"),
        "model": ("temporal_layers", "cross_layers", "scan_unroll"),
        "optim": ("lr", "coef_lr", "eps", "max_grad_norm"),
        "train": ("batch_size", "log_every", "keep_checkpoints"),
        "eval": ("batch_size", "text_block"),
    }.items():
        for name in names:
            yield f"config.{group}.{name}", getattr(getattr(config, group), name)
