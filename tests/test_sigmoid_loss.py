"""SigLIP's loss of independent pairs: its formula, in blocks, on any number of devices."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.params import random_params

from drl_jax.config import LossConfig, OptimConfig
from drl_jax.models.drl import init_params, model_definition
from drl_jax.models.towers import INITIAL_LOGIT_BIAS
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import (
    loss_and_parts,
    make_train_step,
    sigmoid_loss,
    state_from_params,
    total_loss,
)

B, L, F, D = 16, 12, 4, 6
SIGMOID = LossConfig(contrastive="sigmoid", cdcr_lambda=0.1)


def made_batch(pairs):
    rng = np.random.default_rng(0)
    return {
        "text_ids": rng.integers(1, 500, (pairs, L)).astype(np.int32),
        "text_mask": np.arange(L) < rng.integers(3, L + 1, (pairs, 1)),
        "frames": rng.integers(0, 256, (pairs, F, 16, 16, 3)).astype(np.uint8),
        "frame_mask": np.arange(F) < rng.integers(1, F + 1, (pairs, 1)),
    }


@pytest.fixture(scope="module")
def batch():
    return made_batch(B)


@pytest.fixture(scope="module")
def model(tiny_model):
    """With a bias of the logits, and images of one patch."""
    backbone = dataclasses.replace(
        tiny_model.backbone,
        vocab_size=500,
        image_resolution=16,
        vision_layers=1,
        text_layers=1,
        logit_bias=True,
    )
    return dataclasses.replace(tiny_model, backbone=backbone, temporal_layers=1, cross_layers=1)


def written_out(text, video, scale, bias):
    """The loss and its gradients for dot products, in float64."""
    text, video = text.astype(np.float64), video.astype(np.float64)
    sim = text @ video.T
    z = 2 * np.eye(len(text)) - 1
    margin = z * (scale * sim + bias)
    loss = np.logaddexp(0, -margin).sum() / len(text)
    by_logit = -z / (1 + np.exp(margin)) / len(text)
    by_sim = scale * by_logit
    return loss, (by_sim @ video, by_sim.T @ text, (by_logit * sim).sum(), by_logit.sum())


# The last pair is of the size of SigLIP's.
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -1.0), (117.33, -12.93)])
@pytest.mark.parametrize("block", [0, 1, 3, 4, 10, 11, 64])
def test_the_loss_is_its_formula_in_blocks_of_any_size(block, scale, bias):
    rng = np.random.default_rng(0)
    text, video = (rng.normal(size=(11, D)).astype(np.float32) for _ in range(2))
    text, video = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, video))

    def loss(text, video, scale, bias):
        return sigmoid_loss(
            lambda part, key: scale * (text @ part["unit"].T) + bias, {"unit": video}, None, block
        )

    found, gradients = jax.value_and_grad(loss, (0, 1, 2, 3))(text, video, scale, bias)
    expected, expected_gradients = written_out(text, video, scale, bias)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=2e-5, atol=2e-6 * np.abs(wanted).max())


def plain_loss(params, batch, key, *, definition, config):
    """The whole loss on one device, from the [B, B] matrix."""
    model = nnx.merge(definition, params)
    text = model.encode_text(batch["text_ids"], batch["text_mask"])
    video = model.encode_video(batch["frames"], batch["frame_mask"])
    dropout_key, cdcr_key = jax.random.split(key)
    sim_matrix = model.similarity(text, video, dropout_key)
    logits = jnp.exp(params["backbone"]["logit_scale"]) * sim_matrix
    logits = logits + params["backbone"]["logit_bias"]
    z = 2 * jnp.eye(B) - 1
    contrastive = jnp.sum(jax.nn.softplus(-z * logits)) / B
    return total_loss(
        contrastive, text, video, cdcr_key, interaction=model.interaction, config=config
    )


@pytest.mark.parametrize(("interaction", "cdcr"), [("dp", 1), ("ti", 1), ("wti", 3), ("xti", 0)])
def test_gradients_are_those_of_the_plain_formula(model, batch, interaction, cdcr):
    """Blocks, microbatches, fsdp and 8 devices against none of them.

    xti's dropout depends on the block, so the plain formula takes the same blocks there.
    """
    config = dataclasses.replace(SIGMOID, cdcr=cdcr)
    model = dataclasses.replace(model, interaction=interaction, similarity_block=5)
    params = random_params(model)
    # Near zero, so that every pair has a gradient that counts.
    params["backbone"]["logit_bias"] = jnp.float32(-3.0)
    key = jax.random.key(1)

    plain_model = model if cdcr == 0 else dataclasses.replace(model, similarity_block=0)
    plain = functools.partial(plain_loss, definition=model_definition(plain_model), config=config)
    (loss, parts), expected = jax.jit(jax.value_and_grad(plain, has_aux=True))(params, batch, key)

    layout = make_layout(fsdp=True)
    function = functools.partial(
        loss_and_parts,
        definition=model_definition(model),
        config=config,
        layout=layout,
        microbatch=8,
    )
    shardings = (layout.parameters(params), layout.batch_sharded, None)
    compiled = jax.jit(jax.value_and_grad(function, has_aux=True), in_shardings=shardings)
    (found_loss, found_parts), found = compiled(params, layout.put_batch(batch), key)

    assert float(found_loss) == pytest.approx(float(loss), rel=1e-5)
    for name, value in parts.items():
        assert float(found_parts[name]) == pytest.approx(float(value), rel=1e-5), name
    assert (float(parts["cdcr_loss"]) > 0) == (cdcr > 0)
    assert abs(float(expected["backbone"]["logit_bias"])) > 0.01
    for (path, wanted), leaf in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        scale = max(np.abs(wanted).max(), 1e-4)
        np.testing.assert_allclose(
            leaf, wanted, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path)
        )


def trained(model, params, batch, devices, *, fsdp=False, microbatch=0, steps=8):
    """Scalars of some steps, and the parameters after them."""
    layout = make_layout(jax.devices()[:devices], fsdp=fsdp)
    tx = make_optimizer(OptimConfig(lr=1e-2, coef_lr=1.0), total_steps=20)
    state = state_from_params(params, tx, layout)
    step = make_train_step(model, SIGMOID, tx, layout, microbatch=microbatch)
    history = []
    for _ in range(steps):
        state, scalars = step(state, layout.put_batch(batch))
        history.append({name: float(value) for name, value in scalars.items()})
    return history, jax.device_get(state.params)


def test_training_lowers_the_loss_on_any_number_of_devices(model, batch):
    """From SigLIP's scale, which is above CLIP's bound."""
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    params["backbone"]["logit_scale"] = jnp.log(jnp.float32(117.33))
    history, end = trained(model, params, batch, 1)
    blocks = dataclasses.replace(model, similarity_block=5, remat="full")
    other, other_end = trained(blocks, params, batch, 8, fsdp=True, microbatch=8)
    for step, expected in zip(other, history, strict=True):
        assert step == pytest.approx(expected, rel=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max() + 1e-4),
        other_end,
        end,
    )
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[0]["logit_bias"] == INITIAL_LOGIT_BIAS
    assert history[-1]["logit_bias"] != INITIAL_LOGIT_BIAS
    assert history[0]["logit_scale"] == pytest.approx(117.33)
    assert min(step["logit_scale"] for step in history) > 101


def shapes_of(model, devices):
    """Shapes of the arrays of the compiled gradient on one device: all, and what is gathered."""
    layout = make_layout(jax.devices()[:devices])
    config = dataclasses.replace(SIGMOID, cdcr=0 if model.interaction == "xti" else 3)
    loss = functools.partial(
        loss_and_parts, definition=model_definition(model), config=config, layout=layout
    )
    params = random_params(model)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.batch_sharded)
        for name, x in made_batch(PAIRS).items()
    }
    grad = jax.jit(layout.on_mesh(jax.grad(loss, has_aux=True), model.dtype))
    hlo = grad.lower(params, batch, jax.random.key(0)).compile().as_text()
    found = re.findall(r"\b(?:f32|bf16|pred|s32|u32|u8)\[([\d,]+)\]", hlo)
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* (?:all-gather|all-to-all)\(", hlo)
    return sizes_of(found), sizes_of(gathered)


def sizes_of(shapes):
    return {tuple(map(int, shape.split(","))) for shape in shapes}


# Sizes that nothing else has: 40 blocks of 11.
PAIRS, BLOCK = 440, 11


def holds_all_pairs(shape, rows):
    """Whether an array has a value for each of `rows` texts and each of PAIRS videos.

    Blocks may be an axis of their own, as in values that a loop keeps for its backward pass.
    """
    blocks = PAIRS // BLOCK
    axes = ([rows, PAIRS], [rows * PAIRS], [blocks, rows, BLOCK], [blocks, rows * BLOCK])
    return any(not Counter(sizes) - Counter(shape) for sizes in axes)


@pytest.mark.parametrize(("interaction", "devices"), [("wti", 8), ("wti", 1), ("xti", 1)])
def test_no_array_of_all_pairs_exists(model, interaction, devices):
    """Neither forward nor backward; videos are gathered once, and rows of texts stay."""
    model = dataclasses.replace(model, interaction=interaction, similarity_block=BLOCK)
    found, gathered = shapes_of(model, devices)
    rows = PAIRS // devices
    assert not [shape for shape in found if holds_all_pairs(shape, rows)]
    # The logits of a block are there.
    assert (rows, BLOCK) in found or (rows * BLOCK, 1) in found
    if devices > 1:
        width = model.backbone.embed_dim
        assert gathered <= {(PAIRS, F, width), (PAIRS, F), (PAIRS,)}
        assert (PAIRS, F, width) in gathered


def test_without_blocks_there_is_an_array_of_all_pairs(model):
    """What the test above looks for can be found."""
    found, _ = shapes_of(dataclasses.replace(model, similarity_block=0), 8)
    assert [shape for shape in found if holds_all_pairs(shape, PAIRS // 8)]
