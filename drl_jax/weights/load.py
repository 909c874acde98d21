"""Loads foreign weights into our parameters and back; every name of both sides is accounted for."""

import contextlib
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from drl_jax.config import BackboneConfig, Config, ConfigError, DataConfig, LossConfig, ModelConfig
from drl_jax.models.drl import (
    Params,
    config_from_dict,
    copies_text_tower,
    init_params,
    param_shapes,
)
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.linear import without_adapters
from drl_jax.models.reference_names import Entry, entries
from drl_jax.models.temporal import TEMPORAL_HEADS
from drl_jax.models.tokenizers import check_cleaning
from drl_jax.models.towers import INITIAL_LOGIT_BIAS
from drl_jax.weights.errors import WeightsError, about, some
from drl_jax.weights.tensors import StateDict, Tensor
from drl_jax.weights.weights_file import Weights

# Fields of BackboneConfig that say how frames and captions are prepared, and of the loss.
_NO_SIZES = ("pixel_mean", "pixel_std", "resize", "interpolation", "text_cleaning", "pad_id",
             "logit_bias")  # fmt: skip
_ALIGNMENT = 64  # bytes

# ---------------------------------------------------------------- configuration


def heads_of_weights(config: ModelConfig, weights: Weights) -> ModelConfig:
    """The configuration with the interaction and the temporal head of a DRL checkpoint.

    `dp` and `ti` have no parameters: the configuration's own is kept if it is one of them, else
    `dp`.
    """
    names = weights.state.keys()
    bare = config.interaction if config.interaction in ("dp", "ti") else "dp"
    changes = {"interaction": bare, "agg_module": "none"}
    for field, heads in (("interaction", INTERACTIONS), ("agg_module", TEMPORAL_HEADS)):
        for name, head in heads.items():
            if head and (fields := head.config_of_weights(names)) is not None:
                changes |= {field: name, **fields}
                break  # A registered subclass has the same names.
    return dataclasses.replace(config, **changes)


def config_of_weights(weights: Weights, interaction: str = "dp") -> Config:
    """The configuration of a model that is made of weights alone.

    A stored configuration is used. The heads of a DRL checkpoint are inferred (without any,
    CLIP4Clip's meanP is dp), and it reads as many words as its original. Towers alone get no
    temporal head, as in zero-shot retrieval, and read all words that they have positions for.
    `interaction` is "dp" or "ti", for weights without interaction parameters.

    Raises:
      ConfigError: the sizes are impossible.
    """
    if weights.config is not None:
        changes = {"init": "", "release": "", "tokenizer": weights.tokenizer}
        model = dataclasses.replace(weights.config.model, **changes)
        return dataclasses.replace(weights.config, model=model)
    model = heads_of_weights(ModelConfig(interaction=interaction), weights)
    max_words = weights.description.backbone.context_length
    if weights.is_of_drl:
        max_words = min(DataConfig.max_words, max_words)
    data = DataConfig(holdout=500, max_words=max_words)
    config = Config(data=data, model=model, loss=LossConfig(cdcr=0))
    return with_backbone_of(config, weights)


def with_backbone_of(config: Config, weights: Weights) -> Config:
    """The configuration with the description of the towers from the weights, checked again.

    The sigmoid loss has a bias of the logits also where the weights have none.

    Raises:
      ConfigError: the configuration has other sizes, which are not the defaults; or the rest of it
        does not go with those of the weights.
    """
    backbone = weights.description.backbone
    if config.loss.contrastive == "sigmoid" or config.model.backbone.logit_bias:
        backbone = dataclasses.replace(backbone, logit_bias=True)
    if different := _differences(config.model.backbone, backbone):
        raise ConfigError(
            f"config.model.init={config.model.init} has other sizes than the configuration:"
            f" {', '.join(different)}; choose a configuration with these or with the default sizes"
            " (configs/msrvtt.py), or train from scratch with config.model.init="
        )
    tokenizer = config.model.tokenizer or weights.tokenizer
    model = dataclasses.replace(config.model, backbone=backbone, tokenizer=tokenizer)
    return config_from_dict(dataclasses.asdict(dataclasses.replace(config, model=model)))


def _differences(wanted: BackboneConfig, found: BackboneConfig) -> list[str]:
    """The sizes that a configuration asks for and the weights do not have.

    A configuration with the default sizes asks for none, and none asks for the default image size.
    What the file says of its input is not compared: it is known better than in a configuration.
    """
    sizes = [field.name for field in dataclasses.fields(found) if field.name not in _NO_SIZES]
    asked = {name for name in sizes if getattr(wanted, name) != getattr(BackboneConfig, name)}
    if asked - {"image_resolution"}:
        asked |= set(sizes) - {"image_resolution"}
    return [
        f"{name} is {getattr(found, name)}, not {getattr(wanted, name)}"
        for name in sizes
        if name in asked and getattr(found, name) != getattr(wanted, name)
    ]


# ---------------------------------------------------------------- parameters


def params_from_state(state: StateDict, shapes: Params, *, as_bfloat16: bool = False) -> Params:
    """Converts tensors under the reference's names to parameters of the given shapes.

    `shapes` are those of the whole model, or {"backbone": ..} alone. The parameters are float32;
    with `as_bfloat16`, those that lose nothing by it are bfloat16: kernels that are rounded to it
    before each product, and tensors that have this type.

    Raises:
      WeightsError: a tensor is missing, unknown, of another shape, or not finite.
    """
    table = check_state(state, shapes)
    leaves = []
    for entry in table:
        tensors = [state[name] for name in entry.names]
        is_kept = re.search(r"/(attn|mlp)/\w+/kernel$|/conv1/kernel$", entry.path) or all(
            tensor.dtype == jnp.bfloat16 for tensor in tensors
        )
        dtype = jnp.bfloat16 if as_bfloat16 and is_kept else np.float32
        leaf = _filled(entry, tensors, np.dtype(dtype))
        # A sum in float64 overflows for no float32; a mask would need memory.
        if not np.isfinite(np.sum(leaf, dtype=np.float64)):
            lost = (n for n in entry.names if not np.isfinite(np.asarray(state[n])).all())
            name = next(lost, entry.names[0])
            raise WeightsError(f"{name} has values that are not finite; get the file again")
        leaves.append(jax.device_put(leaf))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _filled(entry: Entry, tensors: list, dtype: np.dtype) -> np.ndarray:
    """A parameter of the reference's tensors, which are read into it without a copy in between.

    The array is aligned as JAX's own, so that a CPU device takes it over instead of copying it.
    """
    size = math.prod(entry.shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    parameter = memory[start : start + size].view(dtype).reshape(entry.shape)
    for part, tensor in zip(entry.tensors_in(parameter), tensors, strict=True):
        if isinstance(tensor, Tensor):
            tensor.copy_to(part)
        else:
            part[...] = tensor
    return parameter


def check_state(state: StateDict, shapes: Params) -> list[Entry]:
    """The entries of `shapes`; checks names, shapes and types of a state dict; reads no values.

    Raises:
      WeightsError: see `params_from_state`.
    """
    table = list(entries(shapes))
    wanted = {name: entry.reference_shape() for entry in table for name in entry.names}
    known = set(wanted)
    for head in filter(None, TEMPORAL_HEADS.values()):
        if head.config_of_weights(wanted.keys()) is not None:
            known.update(head.UNUSED_REFERENCE_NAMES)
    if missing := sorted(wanted.keys() - state.keys()):
        raise WeightsError(f"the weights lack {some(missing)}, which the model has")
    if unknown := sorted(state.keys() - known):
        problem = f"the weights have {some(unknown)}, which the model does not have"
        if not any(name.startswith("clip.") for name in unknown):
            problem += "; the towers alone load with weights_key=clip (config.model.weights_key)"
        raise WeightsError(problem)
    for name, shape in wanted.items():
        found, dtype = state[name].shape, state[name].dtype
        if found != shape:
            raise WeightsError(f"{name} is {found} in the weights and {shape} in the model")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise WeightsError(f"{name} is of {dtype}; weights are floating-point numbers")
    return table


def head_start(config: ModelConfig, weights: Weights) -> str:
    """Says what the heads of a model start from."""
    if weights.has_heads:
        return "heads from the file, too"
    names = {"temporal head": TEMPORAL_HEADS[config.agg_module]}
    names |= {f"interaction {config.interaction}": INTERACTIONS[config.interaction]}
    heads = [name for name, head in names.items() if head and head.COPIED_POSITIONS]
    if not heads:
        return "no head starts from the text tower"
    if copies_text_tower(config):
        return f"{' and '.join(heads)}: from the text tower's blocks"
    backbone = config.backbone
    sizes = f"{backbone.embed_dim} channels and the text tower {backbone.text_width}"
    return f"{' and '.join(heads)}: new, since features have {sizes}"


def initial_params(
    config: ModelConfig, weights: Weights, key: jax.Array, *, for_use: bool = False
) -> Params:
    """Parameters to start training from.

    Heads that the weights do not have start as copies of the text tower, or by `key`. `for_use`
    keeps the parameters in bfloat16 as far as a model that computes in it loses nothing.

    Raises:
      WeightsError: the weights do not fit the model.
      UserError: it has no tokenizer, or the file is damaged.
    """
    # Said before anything large is read.
    check_cleaning(config)
    as_bfloat16 = for_use and config.array_dtype == "bfloat16"
    shapes, state = without_adapters(param_shapes(config)), weights.state
    if not weights.has_heads:
        shapes = {"backbone": shapes["backbone"]}
    if config.backbone.logit_bias and "clip.logit_bias" not in state:
        state = {**state, "clip.logit_bias": np.float32(INITIAL_LOGIT_BIAS)}
    file = weights.contents and weights.contents.files[0]
    with about(file) if file else contextlib.nullcontext():
        weights.verify()
        params = params_from_state(state, shapes, as_bfloat16=as_bfloat16)
    if weights.has_heads and not config.lora.rank:
        return params
    new = _init_new(config, key, params["backbone"])
    return unflatten_dict({**new, **flatten_dict(params)})


@functools.partial(jax.jit, static_argnums=0)
def _init_new(config: ModelConfig, key: jax.Array, backbone: Params) -> dict[tuple, jax.Array]:
    """Heads and adapters by path. Nothing else: a compiled program returns a copy of it."""
    base = flatten_dict(backbone)
    params = flatten_dict(init_params(config, key, backbone)).items()
    return {path: leaf for path, leaf in params if path[0] != "backbone" or path[1:] not in base}
