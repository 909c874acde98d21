"""Fine-tuning: what is trained, adapters, averages and interpolation."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support.params import random_batch, random_params

from drl_jax.config import ConfigError, LossConfig, OptimConfig
from drl_jax.models.drl import param_shapes
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.flops import train_step_flops
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import make_gradient, make_train_step, state_from_params
from drl_jax.training.trainable import Trainable

B, L, F, SIZE = 4, 8, 2, 32
LOSS = LossConfig(cdcr_lambda=0.1)
HEADS = "temporal,interaction,logit_scale"


@pytest.fixture(scope="module")
def model(tiny_model):
    backbone = dataclasses.replace(
        tiny_model.backbone, vocab_size=500, image_resolution=SIZE, vision_layers=3
    )
    return dataclasses.replace(tiny_model, backbone=backbone, temporal_layers=1)


def optim_of(trainable, **others):
    return OptimConfig(lr=1e-3, coef_lr=1.0, trainable=trainable, **others)


def run(model, optim, params, steps=3, start=None):
    """The states after each step; `start` continues one."""
    layout = make_layout(jax.devices()[:1])
    tx = make_optimizer(optim, 20)
    step = make_train_step(model, LOSS, tx, layout, trainable=Trainable.of(optim))
    state = state_from_params(params, tx, layout) if start is None else start
    states = []
    for _ in range(steps):
        state, _ = step(state, layout.put_batch(random_batch(B, L, F, SIZE)))
        states.append(jax.device_get(state))
    return states


def changed(before, after):
    """Paths of the parameters that differ; of stacks, with the layers that do."""
    before, after = flatten_dict(before), flatten_dict(after)
    found = {}
    for path, old in before.items():
        if np.any(different := after[path] != old):
            rows = different.reshape(len(old), -1).any(axis=1) if "resblocks" in path else ()
            found["/".join(map(str, path))] = np.flatnonzero(rows).tolist()
    return found


# ---------------------------------------------------------------- what is trained


def test_frozen_layers_and_towers_stay_and_have_no_moments(model):
    optim = optim_of(f"image@2=0.5,{HEADS}")
    params = random_params(model)
    state = run(model, optim, params)[-1]
    moved = changed(params, state.params)
    own = {name for name in moved if name.startswith("backbone")} - {"backbone/logit_scale"}
    tower = "backbone/visual/"
    assert own >= {tower + "ln_post/scale", tower + "proj"}
    assert all(name.startswith(tower) for name in own)
    kernels = [layers for name, layers in moved.items() if "visual/transformer" in name]
    assert len(kernels) >= 10
    assert all(layers == [2] for layers in kernels)
    moments = flatten_dict(state.opt_state[1].mu)
    assert {path[0] for path in moments} == {"backbone", "temporal", "interaction"}
    assert ("backbone", "token_embedding", "embedding") not in moments
    in_proj = ("backbone", "visual", "transformer", "resblocks", "attn", "in_proj", "kernel")
    assert moments[in_proj].shape[0] == 1


def gradient_of(model, optim, params):
    layout, trainable = make_layout(jax.devices()[:1]), Trainable.of(optim)
    gradient = layout.on_mesh(make_gradient(model, LOSS, layout, trainable), "float32")
    batch = layout.put_batch(random_batch(B, L, F, SIZE))
    return jax.device_get(jax.jit(gradient)(*trainable.split(params), batch, jax.random.key(1))[0])


def test_a_trained_part_has_the_gradient_of_the_whole(model):
    params, optim = random_params(model), optim_of(f"image@1,{HEADS}")
    whole = flatten_dict(gradient_of(model, optim_of(""), params))
    for path, found in flatten_dict(gradient_of(model, optim, params)).items():
        expected = whole[path][1:] if found.shape != whole[path].shape else whole[path]
        bound = 1e-5 * max(np.abs(expected).max(), 1e-2)
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=str(path))


def test_factors_multiply_updates_and_those_of_layers_decay(model):
    params, rest = random_params(model), "image,text,embeddings,temporal,interaction,logit_scale"

    def updates(groups, **others):
        optim = optim_of(groups, warmup_proportion=0.0, max_grad_norm=1e9, **others)
        tx = make_optimizer(optim, 20)
        grads = jax.tree.map(np.ones_like, Trainable.of(optim).split(params)[0])
        return flatten_dict(jax.jit(tx.update)(grads, tx.init(params), params)[0])

    whole, part = updates(""), updates(f"{rest},image@1=0.25,text=0")
    decayed = updates("", layer_decay=0.5)
    assert {path[1] for path in part if path[0] == "backbone"} == {"visual", "logit_scale"}
    for path, expected in whole.items():
        factor, decay = np.ones(expected.shape), np.ones(expected.shape)
        if path[:2] == ("backbone", "visual") and "resblocks" in path:
            factor[1:] = 0.25
            decay *= np.reshape([0.125, 0.25, 0.5], (3, *[1] * (expected.ndim - 1)))
        elif path[:2] == ("backbone", "visual"):
            is_after = path[2] in ("ln_post", "proj")
            factor, decay = (0.25, 1.0) if is_after else (1.0, 0.5**4)
        elif path[0] == "backbone":
            decay = decayed[path] / expected
        np.testing.assert_allclose(decayed[path], decay * expected, rtol=1e-6)
        if path in part:
            np.testing.assert_allclose(part[path], factor * expected, rtol=1e-6)


@pytest.mark.parametrize("groups", ["", "temporal,interaction", "image@1,temporal"])
def test_the_count_of_work_and_memory_is_the_measured_one(model, groups):
    """Of the compiled gradient without loops, whose products are nearly all of its work."""
    backbone = dataclasses.replace(
        model.backbone, vision_width=256, text_width=256, embed_dim=256, vision_layers=2
    )
    model = dataclasses.replace(model, backbone=backbone, scan_unroll=2, remat="none")
    trainable = Trainable.of(optim := optim_of(groups))
    expected = train_step_flops(model, LOSS, B, F, L, trainable)
    layout, shapes = make_layout(jax.devices()[:1]), param_shapes(model)
    gradient = jax.jit(layout.on_mesh(make_gradient(model, LOSS, layout, trainable), "float32"))
    trained, frozen = jax.eval_shape(trainable.split, shapes)
    batch = jax.eval_shape(lambda: random_batch(B, L, F, SIZE))
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = gradient.lower(trained, frozen, batch, key).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.1)
    moments = jax.eval_shape(make_optimizer(optim, 20).init, shapes)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (moments, trained)]
    assert 2 * sizes[1] <= sizes[0] <= 2 * sizes[1] + 4
    if groups:
        assert expected < 0.6 * train_step_flops(model, LOSS, B, F, L)


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("vision", "'vision' is not GROUP"),
        ("image=-1", "'image=-1' is not GROUP"),
        ("image=e", "'image=e' is not GROUP"),
        ("temporal@1", "temporal has no layers"),
        ("image@3", "image@3 names no layer, they are 0 to 2"),
        ("lora", "the model has no lora"),
        ("image=0", "nothing to train"),
        ("image,image@2=0", "after trained ones"),
    ],
)
def test_groups_that_name_nothing(model, trainable, message):
    with pytest.raises(ConfigError, match=message):
        Trainable.of(optim_of(trainable)).check(param_shapes(model))
