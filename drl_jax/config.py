"""The configuration as frozen dataclasses, its checks, and how it is built from nested dicts.

Defaults are the reference's. `ml_collections` is used at the entry points only: a file under
`configs/` returns `ConfigDict(asdict(Config(...)))`, and `models.drl.config_from_dict` builds a
checked Config from its values.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from drl_jax.runtime.errors import UserError

# Encodings of stored frames: JPEG (quality 95, 4:4:4) or exact pixels.
STORAGE_ENCODINGS = ("jpeg", "raw")
# What is kept of a transformer layer for the backward pass: `ModelConfig.remat`.
REMAT = ("none", "dots", "full")
# What computes attention: `ModelConfig.attention`.
ATTENTION = ("auto", "xla")
# Activations of the towers' MLPs.
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
# Layers of the towers' blocks that can have an adapter: `LoRAConfig.targets`.
LORA_TARGETS = ("in_proj", "out_proj", "c_fc", "c_proj")
# How an image becomes a square, and how it is resampled.
RESIZES = ("crop", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")
# What a frame is sampled by: its number, as in the reference, or the time at which it is seen.
FRAME_CLOCKS = ("frames", "time")
# How a caption is cleaned before it is tokenised.
TEXT_CLEANINGS = ("clip", "none", "lower", "canonicalize")


class ConfigError(UserError):
    """A configuration that cannot work; the message names the field and what to do."""


class UnregisteredError(ConfigError):
    """A configuration has an interaction, a head or a family that this process does not know."""


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Family and sizes of the image and the text tower; the defaults are OpenAI's CLIP ViT-B/32.

    A file of weights replaces all of it (`ModelConfig.init`).
    """

    # clip (OpenAI, open_clip), siglip (SigLIP and SigLIP 2), pe (Perception Encoder), or the name
    # of a feature extractor of your own (`--plugin`).
    family: str = "clip"
    embed_dim: int = 512
    image_resolution: int = 224
    vision_layers: int = 12
    vision_width: int = 768
    vision_heads: int = 12
    vision_patch_size: int = 32
    context_length: int = 77  # positions of the text tower
    vocab_size: int = 49408
    text_width: int = 512
    text_heads: int = 8
    text_layers: int = 12
    vision_mlp_width: int = 0  # hidden width of the MLPs; 0: four times the width
    text_mlp_width: int = 0
    activation: str = "quick_gelu"  # one of ACTIVATIONS
    text_activation: str = ""  # of the text tower, where it is another one
    layer_norm_eps: float = 1e-5
    logit_bias: bool = False  # whether the logits have a learned bias (`LossConfig.contrastive`)
    # Mean and standard deviation of pixels, RGB in [0, 1].
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    # crop: the short side becomes image_resolution, and the centre is cut out. squash: both sides
    # become image_resolution.
    resize: str = "crop"
    interpolation: str = "bicubic"  # one of INTERPOLATIONS
    # One of TEXT_CLEANINGS. clip: as OpenAI's tokenizer. lower: lower case. canonicalize: lower
    # case, without punctuation.
    text_cleaning: str = "clip"
    # Token id that a text tower without causal mask sees after the caption.
    pad_id: int = 0

    @property
    def of_towers(self) -> dict[str, Any]:
        """All that the output of the towers depends on beside their parameters, by name."""
        values = dataclasses.asdict(self)
        del values["logit_bias"]
        return values

    @property
    def is_multilingual(self) -> bool:
        """Whether its vocabulary is larger than those of English: CLIP's, and SigLIP's of c4_en."""
        return self.vocab_size > type(self).vocab_size

    @property
    def vision_hidden_width(self) -> int:
        return self.vision_mlp_width or 4 * self.vision_width

    @property
    def text_hidden_width(self) -> int:
        return self.text_mlp_width or 4 * self.text_width


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters in the blocks of both towers: x W + alpha / rank * (x A) B."""

    rank: int = 0  # 0: none
    alpha: float = 0.0  # 0: the rank
    dropout: float = 0.0  # of x, in training
    # The layers that have one: the fused queries, keys and values, the output of attention, and the
    # two layers of the MLP.
    targets: str = "in_proj,out_proj,c_fc,c_proj"

    @property
    def scale(self) -> float:
        return (self.alpha or self.rank) / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    backbone: BackboneConfig = BackboneConfig()
    # Initial weights: a file of towers (docs/weights.md has the table) or of a DRL checkpoint,
    # `hf-hub:ORG/NAME`, or the name of weights that are installed with this package
    # (`shapes_clip`). Their description replaces `backbone` if it is the default one. Empty: random
    # initialisation.
    init: str = ""
    # Name of the release that `init` is of (`hub.releases.RELEASES`), for a file that does not
    # say its activation and has no description beside it. Empty: the file says it.
    release: str = ""
    # Prefix of the towers in `init`, if it holds several pairs of them, e.g. "teacher"; "clip": the
    # towers of a DRL checkpoint without its heads. Empty: the only one.
    weights_key: str = ""
    # Tokenizer: a `tokenizer.json` or a `spiece.model`. Empty: the one beside `init`, or CLIP's.
    tokenizer: str = ""
    # How texts and videos are compared: dp (dot product), ti (token-wise), wti (weighted
    # token-wise), xti (cross transformer), or the name of one of your own (`--plugin`).
    interaction: str = "wti"
    wti_arch: int = 2  # linear layers of wti's weights: 1, 2 or 3
    # Temporal aggregation of frame features: none, seqLSTM, seqTransf, or one of your own.
    agg_module: str = "seqTransf"
    temporal_layers: int = 4  # of seqTransf
    # Layers of xti's cross transformer, and the dropout of its input.
    cross_layers: int = 4
    cross_dropout: float = 0.1
    # Standard deviation of new position embeddings of patches and frames. 0: patches use OpenAI's
    # width**-0.5 and frames copy the text tower's, as in the reference. Small models learn
    # places and the order of frames faster with larger values (docs/benchmarks.md).
    position_std: float = 0.0
    # Adapters; with them, the towers' own parameters are not trained (`OptimConfig.trainable`).
    lora: LoRAConfig = LoRAConfig()
    # Matrix products of the transformers: float32, tf32 or bfloat16. Parameters, norms, softmax,
    # features, similarities and losses are float32 arrays in all cases. With tf32 and bfloat16,
    # products of float32 arrays round their inputs to 11 significant bits on GPUs that can (TF32),
    # and are several times as fast.
    dtype: str = "float32"
    # What the backward pass computes again, one of REMAT: none keeps everything, dots keeps the
    # matrix products and computes norms, activations and attention weights again, full keeps the
    # input of each transformer layer only, and computes a third more.
    remat: str = "dots"
    # What computes attention, one of ATTENTION: auto takes cuDNN's kernel on an NVIDIA GPU if
    # `dtype` is bfloat16, and XLA otherwise.
    attention: str = "auto"
    # Layers per iteration of lax.scan on CPUs; GPUs run no loop over layers. More take longer to
    # compile; measure before changing it.
    scan_unroll: int = 1
    # Videos compared with all texts at a time; bounds the memory of the token-wise product, which
    # is recomputed in the backward pass. 0: all videos.
    similarity_block: int = 128

    @property
    def array_dtype(self) -> str:
        """Dtype of the arrays that the transformers multiply."""
        return "float32" if self.dtype == "tf32" else self.dtype


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
    # Adaptive margin (`train_step.adaptive_margin`) of softmax: the largest one (AVIGATE: 0.1; 0:
    # none), and the margin per cosine distance of two pairs.
    margin: float = 0.0
    margin_scale: float = 0.2


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
    # What is trained, as GROUP, GROUP=FACTOR or GROUP@LAYER=FACTOR, with commas between them:
    # image, text, embeddings, temporal, interaction, logit_scale, lora. FACTOR multiplies the
    # learning rate; `image@8` leaves the first 8 layers, and what is before them, as they are. The
    # last one that names a parameter counts. Empty: everything (docs/training.md).
    trainable: str = ""
    # Multiplies the learning rate of the towers once for each layer between it and the output.
    layer_decay: float = 1.0
    # Decay of the exponential moving average of what is trained, which is what is evaluated and
    # exported: min(ema, (1 + step) / (10 + step)). 0: none.
    ema: float = 0.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    dataset: str = "msrvtt"
    data_dir: str = "data"  # directory of built datasets
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
    # What frames are sampled by, one of FRAME_CLOCKS.
    frame_clock: str = "frames"
    # Frames as a screen shows them: HDR in standard range, deinterlaced, on white where they are
    # transparent. The reference's frames are not.
    as_shown: bool = False
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
    # Build the dataset if it is absent. Only drawn ones (`shapes`, ...) need no source files.
    build_if_absent: bool = False
    build_flags: str = ""  # of that build, e.g. "--size=smoke"
    # Directory of the features of the frozen towers, with which training leaves them out; they are
    # computed where they are absent (docs/training.md). Empty: the towers run in each step.
    features: str = ""
    features_dtype: str = "bfloat16"  # of the stored features, bfloat16 or float32


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    batch_size: int = 128  # pairs, over all devices
    # Pairs encoded at a time, over all devices; the backward pass encodes them again. Loss and
    # gradient are those of the whole batch. 0: the whole batch at once.
    microbatch: int = 0
    epochs: int = 5  # 0: no training; tests the weights of `model.init`
    log_every: int = 20
    pictures: bool = True  # whether TensorBoard gets pictures of evaluations
    checkpoint_every: int = 1000  # steps, within an epoch (0: only at its end)
    keep_checkpoints: int = 2
    # Batches whose loss or gradient is not finite that a run leaves out before it stops.
    skip_nonfinite: int = 0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    batch_size: int = 64  # videos or captions encoded at a time, over all devices
    text_block: int = 256  # captions compared with all videos at a time, over all devices


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


# ---------------------------------------------------------------- construction and checks

# Values of fields that are one of a few names; those of model families are handed in.
_CHOICES: dict[str, typing.Collection[str]] = {
    "activation": ACTIVATIONS,
    "text_activation": ("", *ACTIVATIONS),
    "resize": RESIZES,
    "interpolation": INTERPOLATIONS,
    "text_cleaning": TEXT_CLEANINGS,
    "dtype": ("float32", "tf32", "bfloat16"),
    "remat": REMAT,
    "attention": ATTENTION,
    "contrastive": ("softmax", "sigmoid"),
    "storage": STORAGE_ENCODINGS,
    "frame_clock": FRAME_CLOCKS,
    "cache": ("auto", "none", "memory", "device"),
    "features_dtype": ("bfloat16", "float32"),
}
# Numbers that may be 0, that are in [0, 1), and that have other bounds; all others are positive.
_ZERO_IS_VALID = (
    *("vision_mlp_width", "text_mlp_width", "pad_id", "similarity_block", "position_std"),
    *("rank", "alpha"),
    *("holdout", "num_threads", "microbatch", "epochs", "checkpoint_every", "skip_nonfinite"),
    "margin",
)
_BELOW_ONE = ("cross_dropout", "dropout", "ema", "b1", "b2", "warmup_proportion")
_OTHERWISE_BOUNDED = (
    *("seed", "weight_decay", "cdcr", "cdcr_alpha1", "cdcr_alpha2", "cdcr_lambda"),
)
# With BertAdam, a learning rate of 1 moves every weight by up to 1 a step.
_MAX_LR = 1.0


def checked_config(
    values: Mapping[str, Any],
    backbones: Mapping[str, Any],
    interactions: Mapping[str, Any],
    temporal_heads: Mapping[str, Any],
) -> Config:
    """Builds a Config from a nested dict, and checks that its model can be built.

    A field that is missing has its default. The other arguments are classes by `backbone.family`,
    `model.interaction` and `model.agg_module` (None: no head).

    Raises:
      ConfigError: names the field that is unknown, of a wrong type or cannot work.
      UnregisteredError: the interaction or the temporal head is not known.
    """
    config = _from_dict(Config, values, "config")
    families = {"family": backbones, "interaction": interactions, "agg_module": temporal_heads}
    for where, name, value in _leaves(config, "config"):
        _check_value(where, name, value, {**_CHOICES, **families})
    backbone, interaction = config.model.backbone, interactions[config.model.interaction]
    if error := backbones[backbone.family].config_error(backbone):
        raise ConfigError(f"config.model.backbone.{error}")
    if error := interaction.config_error(config.model):
        raise ConfigError(f"config.{error}")
    heads = (temporal_heads[config.model.agg_module], interaction)
    has_positions = any(head and head.COPIED_POSITIONS for head in heads)
    for holds, message in _conditions(config, interaction.CDCR_VARIANTS, has_positions):
        if not holds:
            raise ConfigError(f"config.{message}")
    return config


def checked_backbone_field(name: str, value: Any, where: str) -> Any:
    """A value of a field of BackboneConfig, which is at `where`, e.g. in a file.

    Raises:
      ConfigError: names the place, if the value is of a wrong type or cannot work.
    """
    types = {field.name: field.type for field in dataclasses.fields(BackboneConfig)}
    value = _typed(types[name], value, where)
    _check_value(where, name, value, _CHOICES)
    return value


def _from_dict(cls: type, values: Mapping[str, Any], where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a group of fields, not {values!r}")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(f"{where} has no field {unknown[0]!r}; it has {', '.join(fields)}")
    return cls(**{name: _typed(fields[name], values[name], f"{where}.{name}") for name in values})


def _typed(expected: type, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(expected):
        return _from_dict(expected, value, where)
    if items := typing.get_args(expected):
        if not isinstance(value, list | tuple) or len(value) != len(items):
            raise ConfigError(f"{where} must be a tuple of {len(items)} numbers, not {value!r}")
        return tuple(_typed(item, part, where) for item, part in zip(items, value, strict=True))
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise ConfigError(f"{where} must be {expected.__name__}, not {value!r}")
    if expected is float and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, not {value}")
    return value


def _leaves(group: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    """Dotted name, name and value of each field that is no group."""
    for field in dataclasses.fields(group):
        value, path = getattr(group, field.name), f"{where}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, path)
        else:
            yield path, field.name, value


def _check_value(
    where: str, name: str, value: Any, choices: Mapping[str, typing.Collection[str]]
) -> None:
    if name in choices and value not in choices[name]:
        names = " or ".join(", ".join(choices[name]).rsplit(", ", 1))
        if name in ("family", "interaction", "agg_module"):
            own = "register one of your own, or name its file with --plugin=FILE"
            raise UnregisteredError(f"{where} is {names}, not {value!r}; {own}")
        raise ConfigError(f"{where} is {names}, not {value!r}")
    if name in ("pixel_mean", "pixel_std") and max(map(abs, value)) > 1:
        raise ConfigError(f"{where} must be of pixels in [0, 1], not {value}")
    if type(value) not in (int, float) or name in _OTHERWISE_BOUNDED:
        return
    if name == "layer_norm_eps":
        holds, bound = 0 < value < 1, "in (0, 1)"
    elif name in _BELOW_ONE:
        holds, bound = 0 <= value < 1, "in [0, 1)"
    elif name in _ZERO_IS_VALID:
        holds, bound = value >= 0, "0 or positive"
    else:
        holds, bound = value > 0, "positive"
    if not holds:
        raise ConfigError(f"{where} must be {bound}, not {value:g}")


def _conditions(
    config: Config, cdcr_variants: tuple[int, ...], has_positions: bool
) -> Iterator[tuple[bool, str]]:
    """Yields what has to hold between fields, and the message if it does not."""
    model, data, loss = config.model, config.data, config.loss
    train, optim, length = config.train, config.optim, config.model.backbone.context_length
    yield min(model.backbone.pixel_std) > 0, "model.backbone.pixel_std must be positive"
    yield (
        bool(model.init) or not model.release,
        f"model.release={model.release} describes model.init, which is empty",
    )
    narrowest = min(model.backbone.vision_width, model.backbone.text_width)
    yield (
        model.lora.rank <= narrowest,
        f"model.lora.rank={model.lora.rank} is above the width of a tower, {narrowest}",
    )
    targets = model.lora.targets.split(",")
    yield (
        set(targets) <= set(LORA_TARGETS),
        f"model.lora.targets={model.lora.targets} must be some of {','.join(LORA_TARGETS)}",
    )
    yield (
        not train.microbatch or train.batch_size % train.microbatch == 0,
        f"train.microbatch={train.microbatch} must divide train.batch_size={train.batch_size} (or"
        " be 0)",
    )
    yield (
        train.batch_size > 1 or loss.contrastive != "softmax",
        "train.batch_size=1 leaves the softmax loss no other pair to compare with: choose at least"
        " 2, or config.loss.contrastive=sigmoid",
    )
    yield (
        bool(data.val_split) != bool(data.holdout),
        "set one of data.val_split (a stored split) and data.holdout (a number of training videos):"
        " training evaluates on it after each epoch",
    )
    yield optim.layer_decay <= 1, f"optim.layer_decay={optim.layer_decay:g} is above 1"
    yield optim.lr <= _MAX_LR, f"optim.lr={optim.lr:g} is above {_MAX_LR:g}"
    yield (
        optim.lr * optim.coef_lr <= _MAX_LR,
        f"optim.coef_lr={optim.coef_lr:g} gives the backbone a learning rate above {_MAX_LR:g}",
    )
    yield (
        optim.weight_decay >= 0 and optim.lr * optim.weight_decay < 1,
        f"optim.weight_decay={optim.weight_decay:g} must be 0 or positive, and below 1 / lr",
    )
    # Seeds of NumPy and Grain have 32 bits.
    yield 0 <= config.seed < 2**32, f"seed must be in [0, 2^32), not {config.seed}"
    yield (
        loss.cdcr in cdcr_variants,
        f"loss.cdcr={loss.cdcr} does not go with model.interaction={model.interaction}; it takes"
        f" {', '.join(map(str, cdcr_variants))}",
    )
    # With initial weights, the backbone gets one (`runs.run_params.with_backbone_of`).
    yield (
        loss.contrastive != "sigmoid" or model.backbone.logit_bias or bool(model.init),
        "loss.contrastive=sigmoid needs a bias of the logits; set"
        " config.model.backbone.logit_bias=True",
    )
    yield (
        not loss.margin or loss.contrastive == "softmax",
        f"loss.margin={loss.margin:g} goes with loss.contrastive=softmax; set loss.margin=0",
    )
    yield (
        3 <= data.max_words <= length,
        f"data.max_words must be 3 to model.backbone.context_length ({length})",
    )
    yield (
        not has_positions or data.max_frames < length,
        f"data.max_frames must be below model.backbone.context_length ({length})",
    )
