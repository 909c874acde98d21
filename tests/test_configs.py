"""Every shipped configuration is resolved, and its training step traced."""

import dataclasses
import functools
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from data_prep.datasets import builder_class
from drl_jax.config import Config, ConfigError, DataConfig, LossConfig, TrainConfig
from drl_jax.data.storage import StorageSpec
from drl_jax.models.drl import config_from_dict, param_shapes
from drl_jax.runtime.cli import Parser, add_config_flag, parse_with_config
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import abstract_state, make_train_step

ROOT = Path(__file__).resolve().parent.parent
MSRVTT = [
    *("zeroshot", "dp_none", "dp", "xti_none", "xti", "ti", "wti", "dp_cdcr", "ti_cdcr"),
    *("wti_cdcr", "wti_b16", "dp_cdcr_b16", "ti_cdcr_b16", "wti_cdcr_b16"),
]
OTHERS = ["activitynet", "custom", "didemo", "lsmdc", "msvd", "vatex"]
SHIPPED = [
    *("msrvtt", *(f"msrvtt:{name}" for name in MSRVTT)),
    *("shapes", "shapes:scratch", "shapes:smoke", "shapes_clip", "shapes_clip:smoke"),
    *("shapes_events", "shapes_events:smoke"),
    *OTHERS,
]


def load(name: str):
    file, _, variant = name.partition(":")
    spec = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def test_every_file_is_listed_here():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert {name.partition(":")[0] for name in SHIPPED} == files


@functools.cache
def traced(config: Config) -> tuple:
    """Shapes of the parameters after a step, and those they started with; once for equal models."""
    layout = make_layout()
    batch, data, size = config.train.batch_size, config.data, config.model.backbone.image_resolution
    tx = make_optimizer(config.optim, 100)
    shapes = {
        "text_ids": jax.ShapeDtypeStruct((batch, data.max_words), jnp.int32),
        "text_mask": jax.ShapeDtypeStruct((batch, data.max_words), jnp.bool_),
        "frames": jax.ShapeDtypeStruct((batch, data.max_frames, size, size, 3), jnp.uint8),
        "frame_mask": jax.ShapeDtypeStruct((batch, data.max_frames), jnp.bool_),
    }
    state = abstract_state(config.model, tx, layout)
    step = make_train_step(config.model, config.loss, tx, layout)
    new_state, scalars = jax.eval_shape(step, state, shapes)
    assert scalars["loss"].shape == ()
    fresh = param_shapes(config.model)
    return tuple(jax.tree.map(lambda x: x.shape, tree) for tree in (new_state.params, fresh))


@pytest.mark.parametrize("name", SHIPPED)
def test_config_resolves_and_traces(name):
    config = config_from_dict(json.loads(load(name).to_json_best_effort()))
    # Only what shapes of a step depend on: many configurations have the same.
    after, before = traced(
        Config(
            data=DataConfig(
                max_words=config.data.max_words, max_frames=config.data.max_frames, holdout=1
            ),
            model=dataclasses.replace(config.model, init="", position_std=0.0),
            loss=LossConfig(contrastive=config.loss.contrastive, cdcr=config.loss.cdcr),
            train=TrainConfig(batch_size=16),
        )
    )
    assert after == before


def test_msrvtt_matches_the_command_of_the_reference():
    config = config_from_dict(load("msrvtt").to_dict())
    assert config.model.backbone.vision_patch_size == 32
    assert (config.train.batch_size, config.train.epochs) == (128, 5)
    assert (config.optim.lr, config.optim.coef_lr) == (1e-4, 1e-3)
    assert (config.data.max_words, config.data.max_frames) == (32, 12)
    loss = config.loss
    assert (loss.cdcr_alpha1, loss.cdcr_alpha2, loss.cdcr_lambda) == (0.11, 0.0, 0.001)


@pytest.mark.parametrize("name", OTHERS)
def test_other_datasets_have_the_form_that_their_builder_stores(name):
    config = config_from_dict(load(name).to_dict())
    storage = builder_class(name).DEFAULT_STORAGE
    assert config.data.dataset == name
    assert StorageSpec.of(config) == storage
    assert (config.data.max_frames, config.data.storage) == (storage.max_frames, storage.encoding)
    # Paragraphs are long.
    paragraphs = name in ("activitynet", "didemo")
    assert (config.data.max_words, config.data.max_frames) == ((64, 64) if paragraphs else (32, 12))
    assert (config.optim.lr, config.optim.coef_lr, config.train.epochs) == (1e-4, 1e-3, 5)
    assert config.train.batch_size == (32 if name == "custom" else 128)


def test_rows_of_the_ablation():
    alphas = {"dp_cdcr": 0.14, "ti_cdcr": 0.16, "wti_cdcr": 0.11}
    for name in MSRVTT:
        config, row = config_from_dict(load(f"msrvtt:{name}").to_dict()), name.removesuffix("_b16")
        assert config.model.interaction == row.split("_")[0].replace("zeroshot", "dp"), name
        assert (config.model.agg_module == "none") == row.endswith(("_none", "zeroshot")), name
        assert (config.loss.cdcr > 0) == row.endswith("_cdcr"), name
        assert config.model.backbone.vision_patch_size == (16 if name.endswith("_b16") else 32)
        assert config.loss.cdcr_alpha1 == alphas.get(row, 0.0), name


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", 1.5, "config.seed must be int"),
        ("seed", -1, r"config.seed must be in \[0, 2\^32\), not -1"),
        ("sead", 1, "config has no field 'sead'"),
        ("data.max_words", 100, "config.data.max_words must be 3 to"),
        ("data.holdout", 5, "set one of data.val_split"),
        ("data.storage", "png", "config.data.storage is jpeg or raw"),
        ("data.cache", "disk", "data.cache is auto, none, memory or device, not 'disk'"),
        (
            "model.backbone.vision_heads",
            7,
            "config.model.backbone.vision_width must be a multiple",
        ),
        ("model.interaction", "mlp", "model.interaction is .*, not 'mlp'"),
        ("model.interaction", "xti", "loss.cdcr=3 does not go with model.interaction=xti; it take"),
        ("model.agg_module", "mean", "model.agg_module is none, seqLSTM or seqTransf"),
        ("model.dtype", "float16", "model.dtype is float32, tf32 or bfloat16, not 'float16'"),
        ("train.batch_size", 0, "config.train.batch_size must be positive"),
        ("train.batch_size", 1, "train.batch_size=1 .* softmax .* at least 2, or config"),
        ("train.microbatch", 7, "train.microbatch=7 must divide train.batch_size="),
        ("train.skip_nonfinite", -1, "train.skip_nonfinite must be 0"),
        ("loss.contrastive", "sigmoid", "needs a bias .* config.model.backbone.logit_bias=True$"),
        ("optim.lr", 1e30, r"config.optim.lr=1e\+30 is above 1"),
        ("optim.lr", math.nan, "config.optim.lr must be a finite number, not nan"),
        ("optim.b1", 1.5, r"config.optim.b1 must be in \[0, 1\), not 1.5"),
        ("optim.weight_decay", -5.0, "config.optim.weight_decay=-5 must be 0 or positive"),
    ],
)
def test_invalid_fields_are_named(field, value, message):
    values = load("shapes").to_dict()
    values["model"]["init"] = ""
    *groups, name = field.split(".")
    functools.reduce(lambda group, key: group[key], groups, values)[name] = value
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


def test_a_margin_is_of_softmax():
    values = load("shapes").to_dict()
    values["loss"] |= {"contrastive": "sigmoid", "margin": 0.1}
    with pytest.raises(
        ConfigError, match=r"config.loss.margin=0.1 goes with loss.contrastive=softm"
    ):
        config_from_dict(values)


def test_configurations_of_the_package_are_found_from_everywhere(tmp_path, monkeypatch):
    def parse(argument):
        parser = Parser("tests")
        add_config_flag(parser)
        return parse_with_config(parser, [argument])[1]

    monkeypatch.chdir(tmp_path)
    assert parse("--config=configs/shapes.py:smoke").train.epochs == 2
    # One in the working directory comes first.
    (tmp_path / "configs").mkdir()
    own = (ROOT / "configs" / "shapes.py").read_text().replace("epochs=", "epochs=77+")
    (tmp_path / "configs" / "shapes.py").write_text(own)
    assert parse("--config=configs/shapes.py").train.epochs > 77


def test_an_integer_is_a_float_where_one_is_wanted():
    values = load("shapes").to_dict()
    values["optim"]["lr"] = 1
    assert config_from_dict(values).optim.lr == 1.0
