"""One training step: the same on any number of devices, in any blocks; small memory, few bytes."""

import dataclasses
import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.params import random_batch, random_params

from benchmarks.hlo import collective_bytes
from drl_jax.config import LossConfig, OptimConfig
from drl_jax.evaluation.embedder import make_embed_steps
from drl_jax.models.drl import init_params, model_definition, param_shapes
from drl_jax.models.towers import INITIAL_LOGIT_BIAS
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.optimizer import MAX_LOGIT_SCALE, make_optimizer, make_schedule
from drl_jax.training.train_step import (
    TrainState,
    abstract_state,
    apply_gradients,
    loss_and_parts,
    make_train_step,
    sigmoid_loss,
    state_from_params,
)

B, L, F, SIZE = 16, 12, 4, 32
STEPS = 6
SIGMOID = LossConfig(contrastive="sigmoid", cdcr_lambda=0.1)
# Everything that saves memory, together.
BLOCKS = {"similarity_block": 5, "remat": "full"}


@pytest.fixture(scope="module")
def batch():
    return random_batch(B, L, F, SIZE)


@pytest.fixture(scope="module")
def model(tiny_model):
    """With a bias of the logits, which softmax ignores, and a small vocabulary: its rows are most
    of the optimiser's work."""
    backbone = dataclasses.replace(
        tiny_model.backbone,
        vocab_size=500,
        image_resolution=SIZE,
        vision_layers=1,
        text_layers=1,
        logit_bias=True,
    )
    return dataclasses.replace(tiny_model, backbone=backbone, temporal_layers=1, cross_layers=1)


@pytest.fixture(scope="module")
def params(model):
    """The model's own initialisation: the bounds below hold for parameters of its size."""
    return jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))


def run(model, params, batch, devices, loss=None, *, fsdp=False, microbatch=0):
    """Scalars of some steps, the parameters after each, and the last state.

    Every second step has the norms of parameters and updates.
    """
    layout = make_layout(jax.devices()[:devices], fsdp=fsdp)
    tx = make_optimizer(OptimConfig(lr=1e-3, coef_lr=1.0), total_steps=20)
    state = state_from_params(params, tx, layout)
    step = make_train_step(
        model, loss or LossConfig(), tx, layout, microbatch=microbatch, norms_every=2
    )
    history, after = [], []
    for _ in range(STEPS):
        state, scalars = step(state, layout.put_batch(batch))
        history.append({name: float(value) for name, value in scalars.items()})
        after.append(jax.device_get(state.params))
    return history, after, state


@pytest.fixture(scope="module")
def one_device(model, params, batch):
    return run(model, params, batch, 1)


@pytest.mark.parametrize("saves_memory", [False, True])
def test_steps_do_not_depend_on_the_devices(model, params, batch, one_device, saves_memory):
    """Nor on fsdp, microbatches, blocks and rematerialised layers."""
    expected_history, expected, _ = one_device
    options = {"fsdp": True, "microbatch": 8} if saves_memory else {}
    model = dataclasses.replace(model, **(BLOCKS if saves_memory else {}))
    history, found, state = run(model, params, batch, 8, **options)
    for step, expected_step in zip(history, expected_history, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-4, nan_ok=True)
    assert history[-1]["loss"] < history[0]["loss"]
    assert int(state.step) == STEPS
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(expected[-1]), jax.tree.leaves(found[-1]), strict=True
    ):
        difference = np.abs(other - leaf).max() / max(np.abs(leaf).max(), 1e-2)
        assert difference < 1e-4, (jax.tree_util.keystr(path), difference)
    for tree in (state.params, state.opt_state) if saves_memory else ():
        leaves = jax.tree.leaves(tree)
        held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
        # An eighth of what is large enough to split; the rest is on every device.
        assert held < 0.4 * sum(leaf.size for leaf in leaves)


def test_norms_and_entropies_are_those_of_numpy(model, batch, one_device):
    (first, second, *_), (before, after, *_), _ = one_device
    assert np.isnan([first["param_norm"], first["update_norm_new"]]).all()

    def norm(tree):
        return np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree)))

    update = jax.tree.map(np.subtract, after, before)
    for name, tree in (("param_norm", before), ("update_norm", update)):
        new = {group: leaves for group, leaves in tree.items() if group != "backbone"}
        assert second[name] == pytest.approx(norm(tree), rel=1e-3)
        assert second[f"{name}_backbone"] == pytest.approx(norm(tree["backbone"]), rel=1e-3)
        assert second[f"{name}_new"] == pytest.approx(norm(new), rel=1e-3)

    encode = make_embed_steps(model, make_layout(jax.devices()[:1])).encode_text
    text = encode(before, batch["text_ids"], batch["text_mask"])
    weights = np.asarray(text["text_weight"])
    entropy = -np.sum(weights * np.log(np.where(weights > 0, weights, 1)), axis=1).mean()
    assert second["word_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert 0 < second["frame_entropy"] < np.log(F)


def test_the_sigmoid_loss_is_of_similarities_with_a_scale_and_a_bias(model, params, batch):
    # Above CLIP's bound.
    scale = {"logit_scale": jnp.log(jnp.float32(117.33))}
    params = {**params, "backbone": {**params["backbone"], **scale}}
    history, _, _ = run(model, params, batch, 1, SIGMOID)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[0]["logit_bias"] == INITIAL_LOGIT_BIAS != history[-1]["logit_bias"]
    assert history[0]["logit_scale"] == pytest.approx(117.33)
    assert min(step["logit_scale"] for step in history) > 101
    steps = make_embed_steps(model, make_layout(jax.devices()[:1]))
    text = steps.encode_text(params, batch["text_ids"], batch["text_mask"])
    video = steps.encode_video(params, batch["frames"], batch["frame_mask"])
    logits = 117.33 * np.asarray(steps.similarity(params, text, video)) + INITIAL_LOGIT_BIAS
    expected = np.logaddexp(0, -(2 * np.eye(B) - 1) * logits).sum() / B
    assert history[0]["contrastive_loss"] == pytest.approx(expected, rel=1e-4)


def test_the_softmax_loss_bounds_the_temperature():
    params = {"backbone": {"logit_scale": jnp.float32(MAX_LOGIT_SCALE)}}
    tx = optax.sgd(1.0)
    state = TrainState(jnp.int32(0), params, tx.init(params))
    for gradient, expected in ((-0.5, MAX_LOGIT_SCALE), (0.5, MAX_LOGIT_SCALE - 0.5)):
        grads = {"backbone": {"logit_scale": jnp.float32(gradient)}}
        found = apply_gradients(state, grads, tx).params["backbone"]["logit_scale"]
        assert float(found) == pytest.approx(expected)


def bert_adam_factor(step: int, total: int, warmup: float) -> float:
    """What BertAdam multiplies the learning rate by (`warmup_cosine`), in Python floats."""
    x = step / total
    return x / warmup if x < warmup else 0.5 * (1 + math.cos(math.pi * x))


@pytest.mark.parametrize(
    ("total", "warmup"), [(1, 0.0), (20, 0.3), (110, 0.1), (330, 0.1), (1230, 0.1), (5000, 0.3)]
)
def test_every_step_has_the_learning_rate_of_bert_adam(total, warmup):
    """Compiled, also where warm-up ends and where the cosine is nearly 0."""
    schedule = jax.jit(jax.vmap(make_schedule(1.0, warmup, total)))
    expected = [bert_adam_factor(step, total, warmup) for step in range(total)]
    np.testing.assert_allclose(schedule(np.arange(total)), expected, rtol=1e-6)


# ---------------------------------------------------------------- gradients


def gradient(model, params, batch, loss=None, devices=1, *, fsdp=False, microbatch=0):
    """The loss and its parts, and the gradients, of the program that a training step compiles."""
    layout = make_layout(jax.devices()[:devices], fsdp=fsdp)
    function = functools.partial(
        loss_and_parts,
        definition=model_definition(model),
        config=loss or LossConfig(),
        layout=layout,
        microbatch=microbatch,
    )
    compiled = jax.jit(
        jax.grad(function, has_aux=True),
        in_shardings=(layout.parameters(params), layout.batch_sharded, None),
    )
    grads, parts = compiled(params, layout.put_batch(batch), jax.random.key(1))
    return {name: float(value) for name, value in parts.items()}, jax.device_get(grads)


@pytest.mark.parametrize(
    ("contrastive", "interaction", "margin"),
    [("softmax", "xti", 0.0), ("sigmoid", "wti", 0.0), ("softmax", "wti", 0.1)],
)
def test_gradients_do_not_depend_on_the_devices(model, batch, contrastive, interaction, margin):
    """Nor on fsdp, microbatches and blocks; but dropout has other random numbers in each block."""
    cdcr = 3 if interaction == "wti" else 0
    config = LossConfig(contrastive=contrastive, cdcr=cdcr, cdcr_lambda=0.1, margin=margin)
    model = dataclasses.replace(model, interaction=interaction)
    params = random_params(model)
    # Near zero, so that every pair has a gradient that counts.
    params["backbone"]["logit_bias"] = jnp.float32(-3.0)
    in_blocks = dataclasses.replace(model, **BLOCKS)
    one = in_blocks if interaction == "xti" else model
    parts, expected = gradient(one, params, batch, config)
    found_parts, found = gradient(in_blocks, params, batch, config, 8, fsdp=True, microbatch=8)
    assert found_parts == pytest.approx(parts, rel=1e-5)
    assert (parts["cdcr_loss"] > 0) == (cdcr > 0)
    assert (abs(expected["backbone"]["logit_bias"]) > 0.01) == (contrastive == "sigmoid")
    for (path, wanted), leaf in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        scale = max(np.abs(wanted).max(), 1e-4)
        np.testing.assert_allclose(
            leaf, wanted, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path)
        )


def test_the_adaptive_margin_is_its_formula_and_has_no_gradient(model, batch):
    params = random_params(model)
    definition, config = model_definition(model), LossConfig(cdcr=0, margin=0.03, margin_scale=0.12)
    mask = batch["frame_mask"]

    def similarities(params):
        whole = nnx.merge(definition, params)
        tokens = whole.backbone.encode_text(batch["text_ids"], batch["text_mask"])
        text = whole.encode_text(batch["text_ids"], batch["text_mask"])
        sim_matrix = whole.similarity(text, whole.encode_video(batch["frames"], mask))
        scale = jnp.exp(whole.backbone.logit_scale[...])
        return sim_matrix, scale, tokens.sentence, whole.image_features(batch["frames"], mask)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    with jax.default_matmul_precision("highest"):
        _, _, sentence, images = map(np.float64, jax.jit(similarities)(params))
        sentence, video = unit(sentence), unit((unit(images) * mask[:, :, None]).sum(1))
        margin = 0.12 * (1 - (sentence @ sentence.T + video @ video.T) / 2)
        assert 0.1 < (margin > 0.03).mean() < 0.9
        margin = np.minimum(margin, 0.03) * (1 - np.eye(B))

        def expected(params):
            sim_matrix, scale, *_ = similarities(params)
            logits = scale * (sim_matrix + margin.astype(np.float32))
            by_text, by_video = (jax.nn.log_softmax(logits, axis) for axis in (1, 0))
            return -(jnp.trace(by_text) + jnp.trace(by_video)) / (2 * B)

        wanted, wanted_gradient = jax.jit(jax.value_and_grad(expected))(params)
    parts, found = gradient(model, params, batch, config)
    assert parts["loss"] == pytest.approx(float(wanted), rel=1e-5)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted_gradient), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-4 * max(np.abs(other).max(), 1e-4))


def test_gradients_of_bfloat16_are_summed_in_float32(model, params, batch, one_device):
    """On 1 and 8 devices they differ as float32 sums in another order do, by 1e-6 and less, but
    where the bfloat16 value of a single row is rounded the other way. Summed in bfloat16, a third
    of them differ by 1e-3 to 8e-3."""
    half = dataclasses.replace(model, dtype="bfloat16")
    (parts, one), (_, eight) = (
        gradient(half, params, batch, devices=devices) for devices in (1, 8)
    )
    expected = one_device[0][0]["loss"]
    assert parts["loss"] == pytest.approx(expected, rel=0.05)
    assert parts["loss"] != expected
    assert {leaf.dtype.name for leaf in jax.tree.leaves(one)} == {"float32"}
    differences = jax.tree.map(
        lambda a, b: np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-6), eight, one
    )
    differences = jax.tree.leaves(differences)
    assert np.median(differences) < 1e-6
    assert max(differences) < 5e-4


# The scale and the bias of the last one are of the size of SigLIP's.
@pytest.mark.parametrize(
    ("block", "scale", "bias"), [(0, 10.0, -1.0), (3, 10.0, -1.0), (10, 117.33, -12.93)]
)
def test_the_sigmoid_loss_is_its_formula_in_blocks_of_any_size(block, scale, bias):
    rng = np.random.default_rng(0)
    text, video = (rng.normal(size=(11, 6)).astype(np.float32) for _ in range(2))
    text, video = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, video))

    def loss(text, video, scale, bias):
        return sigmoid_loss(
            lambda part, key: scale * (text @ part["unit"].T) + bias, {"unit": video}, None, block
        )

    found, gradients = jax.value_and_grad(loss, (0, 1, 2, 3))(text, video, scale, bias)
    # Written out, in float64.
    text, video = text.astype(np.float64), video.astype(np.float64)
    sim, z = text @ video.T, 2 * np.eye(11) - 1
    margin = z * (scale * sim + bias)
    np.testing.assert_allclose(found, np.logaddexp(0, -margin).sum() / 11, rtol=2e-6)
    by_logit = -z / (1 + np.exp(margin)) / 11
    by_sim = scale * by_logit
    expected = (by_sim @ video, by_sim.T @ text, (by_logit * sim).sum(), by_logit.sum())
    for gradient, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=2e-5, atol=2e-6 * np.abs(wanted).max())


# ---------------------------------------------------------------- the compiled program

# Sizes that nothing else has, on 8 devices: 40 blocks of 11 pairs, and 55 rows a device.
PAIRS, BLOCK = 440, 11
ROWS = PAIRS // 8


def compiled_step(model, layout, loss=None, microbatch=0):
    """The text of the compiled step, for images of one patch."""
    backbone = dataclasses.replace(model.backbone, image_resolution=16)
    model = dataclasses.replace(model, backbone=backbone)
    tx = make_optimizer(OptimConfig(), total_steps=20)
    step = make_train_step(model, loss or LossConfig(), tx, layout, microbatch=microbatch)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.batch_sharded)
        for name, x in random_batch(PAIRS, L, F, 16).items()
    }
    return step.lower(abstract_state(model, tx, layout), batch).compile().as_text()


def sizes_of(shapes):
    return {tuple(map(int, shape.split(","))) for shape in shapes}


def test_split_parameters_are_gathered_and_activations_stay(model):
    """The embedding table has 500 rows, so it is split by columns; a row stays on its device."""
    moved = collective_bytes(compiled_step(model, make_layout(fsdp=True)))
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))
    # Features, weights and masks of all videos.
    features = PAIRS * F * (4 * model.backbone.embed_dim + 4 + 1)
    assert set(moved) <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Parameters are gathered for the forward pass and again for the backward pass.
    assert moved["all-gather"] < features + 2 * parameters
    assert moved["all-reduce"] + moved.get("reduce-scatter", 0) < features + 2 * parameters


def is_of_all_pairs(shape):
    """Whether an array has a value for each of a device's texts and each video.

    Blocks may be an axis of their own, as in values that a loop keeps for its backward pass.
    """
    blocks = PAIRS // BLOCK
    axes = ([ROWS, PAIRS], [ROWS * PAIRS], [blocks, ROWS, BLOCK], [blocks, ROWS * BLOCK])
    return any(not Counter(sizes) - Counter(shape) for sizes in axes)


@pytest.mark.parametrize("contrastive", ["softmax", "sigmoid"])
def test_collectives_and_memory_of_the_compiled_step(model, contrastive):
    """Videos are gathered once, rows of texts stay; no device has the full product or matrix."""
    loss = LossConfig(contrastive=contrastive)
    model = dataclasses.replace(model, similarity_block=BLOCK)
    hlo = compiled_step(model, make_layout(), loss, microbatch=88)
    assert set(collective_bytes(hlo)) <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = sizes_of(re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", hlo))
    # The videos' features, masks and weights, and one number a pair.
    features = (PAIRS, F, model.backbone.embed_dim)
    assert features in gathered
    assert gathered <= {features, (PAIRS, F), (PAIRS,)}
    found = sizes_of(re.findall(r"\b(?:f32|bf16|pred|s32|u32|u8)\[([\d,]+)\]", hlo))
    assert (PAIRS, PAIRS) not in found
    # Softmax needs the rows of a device; SigLIP's loss not even these.
    assert any(map(is_of_all_pairs, found)) == (contrastive == "softmax")
    # A block of the token-wise product is there; all of it, even of a device's rows, is not.
    assert (BLOCK, F, ROWS, L) in found
    assert max(map(np.prod, found)) < ROWS * L * F * PAIRS / 6  # the pixels
