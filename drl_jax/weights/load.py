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

from drl_jax.config import Config, DataConfig, LossConfig, ModelConfig
from drl_jax.models.drl import Params, config_from_dict, init_params, param_shapes
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.linear import without_adapters
from drl_jax.models.reference_names import Entry, entries
from drl_jax.models.temporal import TEMPORAL_HEADS
from drl_jax.models.tokenizers import check_cleaning
from drl_jax.models.towers import INITIAL_LOGIT_BIAS
from drl_jax.weights.errors import WeightsError, about, some
from drl_jax.weights.tensors import StateDict, Tensor
from drl_jax.weights.weights_file import Weights


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
    changes = {"interaction": interaction, "agg_module": "none"}
    for field, heads in (("interaction", INTERACTIONS), ("agg_module", TEMPORAL_HEADS)):
        for name, head in heads.items():
            found = head and head.config_of_weights(weights.state.keys())
            if found is not None:
                changes |= {field: name, **found}
                break  # A registered subclass has the same names.
    backbone = weights.description.backbone
    usual = DataConfig.max_words if weights.is_of_drl else backbone.context_length
    model = ModelConfig(backbone=backbone, tokenizer=weights.tokenizer, **changes)
    data = DataConfig(holdout=500, max_words=min(usual, backbone.context_length))
    return config_from_dict(
        dataclasses.asdict(Config(data=data, model=model, loss=LossConfig(cdcr=0)))
    )


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
        is_rounded = re.search(r"/(attn|mlp)/\w+/kernel$|/conv1/kernel$", entry.path)
        is_kept = is_rounded or {tensor.dtype for tensor in tensors} == {jnp.dtype("bfloat16")}
        dtype = np.dtype(jnp.bfloat16 if as_bfloat16 and is_kept else np.float32)
        leaf = _filled(entry, tensors, dtype)
        # A sum in float64 overflows for no float32; a mask would need memory.
        if not np.isfinite(np.sum(leaf, dtype=np.float64)):
            lost = (n for n in entry.names if not np.isfinite(np.asarray(state[n])).all())
            name = next(lost, entry.names[0])
            raise WeightsError(f"{name} has values that are not finite; get the file again")
        leaves.append(jax.device_put(leaf))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _filled(entry: Entry, tensors: list, dtype: np.dtype) -> np.ndarray:
    """A parameter of the reference's tensors, aligned so that a CPU device takes it over."""
    size, alignment = math.prod(entry.shape) * dtype.itemsize, 64
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    parameter = memory[start : start + size].view(dtype).reshape(entry.shape)
    for part, tensor in zip(entry.tensors_in(parameter), tensors, strict=True):
        if isinstance(tensor, Tensor):
            tensor.copy_to(part)
        else:
            part[...] = tensor
    return parameter


def check_state(state: StateDict, shapes: Params) -> list[Entry]:
    """The entries of `shapes`; raises the errors of `params_from_state`, but reads no values."""
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
            raise WeightsError(f"{name} is {dtype}: quantised; get the float weights")
    return table


def state_and_shapes(config: ModelConfig, weights: Weights) -> tuple[StateDict, Params]:
    """What `check_state` and `params_from_state` take; ConfigError: the model has no tokenizer."""
    check_cleaning(config)
    shapes, state = without_adapters(param_shapes(config)), weights.state
    if not weights.has_heads:
        shapes = {"backbone": shapes["backbone"]}
    if config.backbone.logit_bias and "clip.logit_bias" not in state:
        state = {**state, "clip.logit_bias": np.float32(INITIAL_LOGIT_BIAS)}
    return state, shapes


def initial_params(
    config: ModelConfig, weights: Weights, key: jax.Array, *, for_use: bool = False
) -> Params:
    """Parameters to start training from.

    Heads that the weights do not have start as copies of the text tower, or by `key`. `for_use`
    keeps the parameters in bfloat16 as far as a model that computes in it loses nothing.
    UserError: the weights do not fit the model, it has no tokenizer, or the file is damaged.
    """
    # What is missing is said before anything large is read.
    state, shapes = state_and_shapes(config, weights)
    as_bfloat16 = for_use and config.array_dtype == "bfloat16"
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
