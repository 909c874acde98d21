"""Files of adapters: what a run trained, without the base that it names; and those of PEFT."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from drl_jax.config import LORA_TARGETS, Config, LoRAConfig
from drl_jax.models.drl import Params, config_from_dict, param_shapes
from drl_jax.models.linear import ADAPTER
from drl_jax.runs.checkpoint_files import owner
from drl_jax.runs.run_params import create_run, restore_params, with_backbone_of
from drl_jax.runs.weights_writer import save_tensors, save_weights
from drl_jax.runs.workdir import CHECKPOINTS, load_config, own_manifest
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.files import write_json
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.trainable import Trainable
from drl_jax.weights.containers import open_weights
from drl_jax.weights.errors import WeightsError, about, read_json, some
from drl_jax.weights.load import config_of_weights, initial_params, params_from_state
from drl_jax.weights.source import weights_sha256
from drl_jax.weights.weights_file import (
    CONFIG_KEY,
    read_weights,
    stored_config,
    verify_export,
)

PEFT_CONFIG, _PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
# Our layer, and which third of its output: queries, keys and values are one product here.
_PRODUCTS = {
    **{f"self_attn.{name}_proj": ("in_proj", third) for third, name in enumerate("qkv")},
    "self_attn.out_proj": ("out_proj", None),
    "mlp.fc1": ("c_fc", None),
    "mlp.fc2": ("c_proj", None),
}
# Fields of a configuration of PEFT that change what an adapter does, and the values that are
# supported beside none. Others of `init_lora_weights` belong to a base that they have changed.
_PEFT_FIELDS: dict[str, tuple] = {
    **{"peft_type": ("LORA",), "bias": ("none",)},
    "init_lora_weights": (True, "gaussian", "orthogonal"),
    **dict.fromkeys(("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"), ()),
    **dict.fromkeys(("fan_in_fan_out", "layer_replication", "alora_invocation_tokens"), ()),
}
_PEFT_NAME = re.compile(
    r"(?:.*\.)?(vision|text)_model\.encoder\.layers\.(\d+)\."
    rf"({'|'.join(map(re.escape, _PRODUCTS))})\.lora_([AB])\.weight"
)


def is_adapter(source: str | Path) -> bool:
    """Whether a path is a file of `save_adapter`, or a folder of PEFT."""
    path = Path(source)
    if path.is_dir() or not path.is_file():
        return (path / PEFT_CONFIG).exists()
    return path.suffix == ".safetensors" and any(".lora_" in n for n in open_weights(path).tensors)


def _of_adapter(config: Config, params: Params) -> Params:
    """The parameters that the base does not have as they are: heads, and what is trained."""
    flat, parts = flatten_dict(params), Trainable.of(config.optim).parts(params)
    own = {p: leaf for p, leaf in flat.items() if p[0] != "backbone" or p in parts}
    return unflatten_dict(own)


def save_adapter(
    path: Path, params: Params, config: Config, base_sha256: str, origin: dict[str, Any]
) -> None:
    """Writes heads, adapters and what else is trained; errors as of `save_weights`."""
    origin = {**origin, "base": base_sha256}
    save_weights(path, _of_adapter(config, params), config, origin=origin)


def export_adapter(workdir: Path, target: Path, checkpoint: str = "best", *, as_peft: bool) -> int:
    """Writes the adapter of a checkpoint of a run; returns its step.

    Raises:
      UserError: no such run or checkpoint, it has no adapters or no base, or a file cannot be
        written.
    """
    config = load_config(workdir)
    if not config.model.lora.rank or not config.model.init:
        raise UserError(f"the run in {workdir} has no adapters of a file of weights (model.init)")
    step, params = restore_params(workdir, config.model, make_layout(), checkpoint)
    if as_peft:
        save_peft(target, params, config)
    else:
        manifest, origin = own_manifest(workdir), owner(workdir / CHECKPOINTS / str(step))
        base = manifest["weights_sha256"] if manifest else weights_sha256(config.model.init)
        save_adapter(target, params, config, base, origin)
    return step


def import_adapter(
    source: Path,
    workdir: Path,
    base: str = "",
    interaction: str = "dp",
    *,
    release: str = "",
    weights_key: str = "",
    tokenizer: str = "",
) -> Config:
    """Creates a run with one checkpoint, of step 0, from an adapter and its base.

    Args:
      source: a file of `save_adapter`, or a folder of PEFT or the file of weights in it.
      base: file or name of the base; empty: that which the file names.
      The others are those of `import_weights`, of the base of a folder of PEFT.

    Raises:
      UserError: a file cannot be read, or is damaged; the base is another one; or `workdir` holds
        a run.
    """
    if source.name == _PEFT_FILE:
        source = source.parent
    if source.is_dir():
        if not base:
            raise UserError(f"{source} names no file of its base; give it with --base=FILE")
        weights = read_weights(base, release, weights_key)
        config = config_of_weights(weights, interaction)
        lora, found = _from_peft(source, config)
        init = {"release": release, "weights_key": weights_key}
        init |= {"tokenizer": tokenizer or weights.tokenizer}
        model = dataclasses.replace(config.model, lora=lora, init=str(base), **init)
        config = config_from_dict(dataclasses.asdict(dataclasses.replace(config, model=model)))
    else:
        contents = open_weights(source)
        with about(source):
            verify_export(contents)
            origin = {}
            if CONFIG_KEY in contents.metadata:
                config, origin = stored_config(contents)
            if "base" not in origin:
                raise WeightsError("does not name the base of its adapters")
        base = base or config.model.init
        if (sha256 := weights_sha256(base)) != origin["base"]:
            raise UserError(
                f"{source} is of another base than {base}: sha256 {origin['base'][:12]}, not"
                f" {sha256[:12]}; name its own with --base=FILE"
            )
        weights = read_weights(base, config.model.release, config.model.weights_key)
        model = dataclasses.replace(config.model, init=str(base), tokenizer=tokenizer)
        config = with_backbone_of(dataclasses.replace(config, model=model), weights)
        with about(source):
            shapes = _of_adapter(config, param_shapes(config.model))
            found = flatten_dict(params_from_state(dict(contents.tensors), shapes))
    params = initial_params(config.model, weights, jax.random.key(config.seed))
    create_run(workdir, config, unflatten_dict(flatten_dict(params) | found))
    return config


# ---------------------------------------------------------------- PEFT


def _from_peft(folder: Path, config: Config) -> tuple[LoRAConfig, dict[tuple, np.ndarray]]:
    """Adapters of a folder, for a model of `config`: their configuration, and arrays by path.

    Queries, keys and values have adapters of their own there; here, one of three times the rank.
    """
    said, tensors = read_json(folder / PEFT_CONFIG), open_weights(folder / _PEFT_FILE).tensors
    with about(folder):
        for name, supported in _PEFT_FIELDS.items():
            if said.get(name) and said[name] not in supported:
                raise WeightsError(f"has {name}={said[name]!r}, which is not supported")
        if not tensors:
            raise WeightsError(f"has no adapters: {_PEFT_FILE} has no tensors")
        matched = {name: _PEFT_NAME.fullmatch(name) for name in tensors}
        if unknown := [name for name, match in matched.items() if match is None]:
            raise WeightsError(f"has adapters of other layers than CLIP's: {some(unknown)}")
        try:
            rank, dropout = int(said["r"]), float(said.get("lora_dropout") or 0.0)
            alpha = float(said["lora_alpha"])
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise WeightsError(f"has no r and lora_alpha in {PEFT_CONFIG}") from error
        if rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
            raise WeightsError(
                f"has r={rank}, lora_alpha={alpha:g} and lora_dropout={dropout:g}; they must be"
                " positive, positive and in [0, 1)"
            )
        scale = alpha / (rank**0.5 if said.get("use_rslora") else rank)
        layers: dict[tuple[str, int, str], dict[str, np.ndarray]] = {}
        for name, match in matched.items():
            tower, layer, product, side = match.groups()
            of_layer = layers.setdefault((tower, int(layer), product), {})
            of_layer[side] = np.asarray(tensors[name], np.float32).T
            if not np.isfinite(of_layer[side]).all():
                raise WeightsError(f"{name} has values that are not finite; get the file again")
        targets = {_PRODUCTS[product][0] for _, _, product in layers}
        width = 3 * rank if "in_proj" in targets else rank
        narrowest = min(config.model.backbone.vision_width, config.model.backbone.text_width)
        if width > narrowest:
            fused = f" for each of queries, keys and values, {width} in all" * (width > rank)
            raise WeightsError(f"has r={rank}{fused}: above the width of a tower, {narrowest}")
        names = ",".join(name for name in LORA_TARGETS if name in targets)
        lora = LoRAConfig(width, scale * width, dropout, names)
        shapes = flatten_dict(param_shapes(dataclasses.replace(config.model, lora=lora)))
        adapters = [path for path in shapes if path[-1] in ADAPTER]
        found = {path: np.zeros(shapes[path].shape, np.float32) for path in adapters}
        for (tower, layer, product), sides in layers.items():
            a, b = (found[(*_layer_path(tower, product), name)] for name in ADAPTER)
            third = _PRODUCTS[product][1]
            out = b.shape[2] if third is None else b.shape[2] // 3
            row, column = rank * (third or 0), out * (third or 0)
            expected = {"A": (a.shape[1], rank), "B": (rank, out)}
            where = f"{product} of layer {layer} of the {tower} tower"
            if sides.keys() != expected.keys():
                missing = f"lora_{min(expected.keys() - sides.keys())}"
                raise WeightsError(f"is incomplete: it lacks {missing} of {where}; get it again")
            if layer >= len(a):
                raise WeightsError(f"is of another base: it has {where}, the base {len(a)} layers")
            if {side: array.shape for side, array in sides.items()} != expected:
                raise WeightsError(f"is of another base: {where} has other sizes")
            a[layer, :, row : row + rank] = sides["A"]
            b[layer, row : row + rank, column : column + out] = sides["B"]
    return lora, found


def _layer_path(tower: str, product: str) -> tuple[str, ...]:
    layer = _PRODUCTS[product][0]
    module = "attn" if product.startswith("self_attn") else "mlp"
    above = ("backbone", "visual") if tower == "vision" else ("backbone",)
    return (*above, "transformer", "resblocks", module, layer)


def save_peft(folder: Path, params: Params, config: Config) -> None:
    """Writes the adapters as PEFT does for Hugging Face's CLIP and SigLIP, without the heads.

    Raises:
      UserError: there are none, the towers are none of these, or a file cannot be written.
    """
    lora = config.model.lora
    if not lora.rank or config.model.backbone.family == "pe":
        raise UserError("PEFT's files are of adapters of CLIP and SigLIP, which this run has not")
    flat, tensors = flatten_dict(params), {}
    for tower in ("vision", "text"):
        for product, (_, third) in _PRODUCTS.items():
            path = _layer_path(tower, product)
            if (*path, ADAPTER[0]) not in flat:
                continue
            a, b = (np.asarray(flat[(*path, name)]) for name in ADAPTER)
            if third is not None:
                b = np.split(b, 3, axis=2)[third]
            for layer in range(len(a)):
                name = f"base_model.model.{tower}_model.encoder.layers.{layer}.{product}"
                for side, array in (("A", a), ("B", b)):
                    tensors[f"{name}.lora_{side}.weight"] = np.ascontiguousarray(array[layer].T)
    targets = set(lora.targets.split(","))
    said = {
        "peft_type": "LORA",
        "base_model_name_or_path": config.model.init,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": lora.dropout,
        "target_modules": [
            p.split(".")[1] for p, (name, _) in _PRODUCTS.items() if name in targets
        ],
        "bias": "none",
        "inference_mode": True,
    }
    try:
        save_tensors(folder / _PEFT_FILE, tensors, {"format": "pt"})
        write_json(folder / PEFT_CONFIG, said)
    except OSError as error:
        raise Unavailable(folder, error, "written") from error
