"""What a run trains: groups of parameters, their learning rates, and the first layers of stacks.

A parameter that is not trained has no gradient and no moments, and the backward pass ends where
nothing before it is trained.
"""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from drl_jax.config import ConfigError, ModelConfig, OptimConfig
from drl_jax.models.drl import Params, model_definition, param_shapes
from drl_jax.models.linear import ADAPTER

GROUPS = ("image", "text", "embeddings", "temporal", "interaction", "logit_scale", "lora")
_ITEM = re.compile(r"(\w+)(?:@(\d+))?(?:=([\d.eE+-]+))?")
_EMBEDDINGS = frozenset(
    ("conv1", "class_embedding", "positional_embedding", "ln_pre", "token_embedding")
)
_Path = tuple[str, ...]


class Group(NamedTuple):
    """Layers from `first` of a named group, and what multiplies their learning rate; 0: frozen."""

    name: str
    first: int
    multiplier: float


class Part(NamedTuple):
    """The trained part of a parameter: its layers from `start`, or all of it with 0.

    `factors` multiply the learning rate: [layers] of the whole stack, or [1].
    """

    start: int
    factors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The groups that are trained; none: everything, or with adapters all but the towers' own.

    Of several groups that a parameter is in, the last one counts.
    """

    groups: tuple[Group, ...] = ()
    layer_decay: float = 1.0
    ema: float = 0.0  # `OptimConfig.ema`

    @classmethod
    def of(cls, config: OptimConfig) -> "Trainable":
        """Reads `OptimConfig.trainable`; ConfigError: an item is not GROUP[@LAYER][=FACTOR]."""
        groups = []
        for item in filter(None, config.trainable.replace(" ", "").split(",")):
            match = _ITEM.fullmatch(item)
            name, first, multiplier = match.groups() if match else ("", None, None)
            try:
                factor = 1.0 if multiplier is None else float(multiplier)
            except ValueError:
                factor = math.nan
            if name not in GROUPS or not 0 <= factor < math.inf:
                raise ConfigError(
                    f"config.optim.trainable: {item!r} is not GROUP, GROUP=FACTOR or"
                    f" GROUP@LAYER=FACTOR; groups are {', '.join(GROUPS)}"
                )
            if first is not None and name not in ("image", "text", "lora"):
                raise ConfigError(f"config.optim.trainable: {item!r}: {name} has no layers")
            groups.append(Group(name, int(first or 0), factor))
        return cls(tuple(groups), config.layer_decay, config.ema)

    # ------------------------------------------------------------ which parameters

    def parts(self, params: Params) -> dict[_Path, Part]:
        """The trained parts of a model's (possibly abstract) parameters by their paths."""
        flat = flatten_dict(params)
        layers = {_tower(p): leaf.shape[0] for p, leaf in flat.items() if "resblocks" in p}
        has_adapters = any(path[-1] in ADAPTER for path in flat)
        parts = {}
        for path, leaf in flat.items():
            names, stacked = _groups_of(path), "resblocks" in path
            factors = np.zeros(leaf.shape[0] if stacked else 1)
            if not self.groups and not (has_adapters and names & {"image", "text"}):
                factors[:] = 1.0
            for name, first, multiplier in self.groups:
                # What precedes the layers of a tower does not belong to the later ones.
                if name in names and (stacked or not (first and "embeddings" in names)):
                    factors[first if stacked else 0 :] = multiplier
            if self.layer_decay != 1.0 and names & {"image", "text"}:
                depth = layers[_tower(path)]
                if stacked:
                    factors *= self.layer_decay ** np.arange(depth, 0, -1.0)
                elif "embeddings" in names:
                    factors *= self.layer_decay ** (depth + 1)
            if trained := np.flatnonzero(factors).tolist():
                parts[path] = Part(trained[0], factors)
        return parts

    def check(self, params: Params) -> None:
        """Compares the groups with a model.

        Raises:
          ConfigError: a group has no parameters or fewer layers, nothing is trained, or a frozen
            layer follows a trained one; or the model has adapters that are not trained.
        """
        flat = flatten_dict(params)
        for name, first, _ in self.groups:
            own = [path for path in flat if name in _groups_of(path)]
            depth = max((flat[path].shape[0] for path in own if "resblocks" in path), default=0)
            if not own:
                problem = f"the model has no {name}"
            elif first and first >= depth:
                problem = f"{name}@{first} names no layer, they are 0 to {depth - 1}"
            else:
                continue
            raise ConfigError(f"config.optim.trainable: {problem}; leave it out")
        parts = self.parts(params)
        if not parts:
            raise ConfigError("config.optim.trainable names nothing to train: every factor is 0")
        if any(path[-1] in ADAPTER and path not in parts for path in flat):
            raise ConfigError(
                "config.optim.trainable leaves out the adapters of config.model.lora; add lora to"
                " it, or set config.model.lora.rank=0"
            )
        for path, (start, factors) in parts.items():
            if not factors[start:].all():
                name = "/".join(map(str, path))
                raise ConfigError(
                    f"config.optim.trainable freezes layers of {name} after trained ones; freeze"
                    " the first layers only"
                )

    def definition(self, model: ModelConfig) -> nnx.GraphDef:
        """The model, whose first layers that are not trained get no gradient."""
        starts: dict[_Path, list[int]] = {("backbone", "visual"): [], ("backbone",): []}
        for path, part in self.parts(param_shapes(model)).items():
            if path[0] == "backbone" and "resblocks" in path:
                starts[_tower(path)].append(part.start)
        image, text = (min(of_tower, default=0) for of_tower in starts.values())
        return model_definition(model, (image, text))

    # ------------------------------------------------------------ the two parts

    def split(self, params: Params) -> tuple[Params, Params]:
        """The trained and the frozen part; a stack may be in both. Trained is all: no copy."""
        parts, flat = self.parts(params), flatten_dict(params)
        if len(parts) == len(flat) and not any(part.start for part in parts.values()):
            return params, {}
        trained = {
            path: flat[path][part.start :] if part.start else flat[path]
            for path, part in parts.items()
        }
        frozen = {path: leaf for path, leaf in flat.items() if path not in parts}
        frozen |= {path: flat[path][: part.start] for path, part in parts.items() if part.start}
        return unflatten_dict(trained), unflatten_dict(frozen)

    @staticmethod
    def join(trained: Params, frozen: Params) -> Params:
        """The whole of what `split` returns."""
        if not frozen:
            return trained
        flat, ours = flatten_dict(frozen), flatten_dict(trained)
        both = {path: jnp.concatenate([flat[path], ours[path]]) for path in flat.keys() & ours}
        return unflatten_dict(flat | ours | both)

    def scaled(self, updates: Params, params: Params) -> Params:
        """Multiplies updates of the trained part by its factors; `params` are all."""
        parts = self.parts(params)
        if all((part.factors == 1.0).all() for part in parts.values()):
            return updates

        def scale(path: _Path, update: jax.Array) -> jax.Array:
            start, factors = parts[path]
            factors = np.float32(factors[start if len(factors) > 1 else 0 :])
            shape = (-1, *[1] * (update.ndim - 1)) if update.ndim else ()
            return update * factors.reshape(shape)

        return unflatten_dict({p: scale(p, leaf) for p, leaf in flatten_dict(updates).items()})


@functools.cache
def _groups_of(path: _Path) -> frozenset[str]:
    if path[-1] in ADAPTER:
        return frozenset(["lora"])
    if path[0] != "backbone":
        return frozenset([path[0]])
    if path[1].startswith("logit_"):
        return frozenset(["logit_scale"])
    inside = path[2] if path[1] == "visual" else path[1]
    tower = "image" if path[1] == "visual" else "text"
    return frozenset([tower, "embeddings"] if inside in _EMBEDDINGS else [tower])


def _tower(path: _Path) -> Any:
    """The module that holds a stack of layers and what is beside it."""
    return path[:2] if path[:2] == ("backbone", "visual") else path[:1]
