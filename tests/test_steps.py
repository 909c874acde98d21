"""One training step: the same on any number of devices, in any blocks; small memory, few bytes."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.params import random_batch, random_params

from benchmarks.hlo import collective_bytes
from drl_jax.config import LossConfig, OptimConfig
from drl_jax.evaluation.embedder import make_embed_steps
from drl_jax.models.drl import model_definition, param_shapes
from drl_jax.models.towers import INITIAL_LOGIT_BIAS
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.optimizer import MAX_LOGIT_SCALE, make_optimizer
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
    return random_params(model)


class Trainer:
    """A compiled step on some devices, and the state it starts from."""

    def __init__(self, model, params, devices, loss=None, *, fsdp=False, **options):
        self.layout = make_layout(jax.devices()[:devices], fsdp=fsdp)
        tx = make_optimizer(OptimConfig(lr=1e-3, coef_lr=1.0), total_steps=20)
        self.state = state_from_params(params, tx, self.layout)
        self.step = make_train_step(model, loss or LossConfig(), tx, self.layout, **options)

    def run(self, batch, steps=STEPS):
        history = []
        for _ in range(steps):
            self.state, scalars = self.step(self.state, self.layout.put_batch(batch))
            history.append({name: float(value) for name, value in scalars.items()})
        return history


@pytest.fixture(scope="module")
def one_device(model, params, batch):
    """Scalars of the steps of each loss on one device, and the parameters after them."""
    # Of SigLIP's size.
    scale = {**params["backbone"], "logit_scale": jnp.log(jnp.float32(117.33))}
    starts = {"softmax": params, "sigmoid": {**params, "backbone": scale}}

    def run(name):
        trainer = Trainer(model, starts[name], 1, LossConfig() if name == "softmax" else SIGMOID)
        history = trainer.run(batch)
        return starts[name], history, jax.device_get(trainer.state.params)

    return {name: run(name) for name in starts}


@pytest.mark.parametrize(
    ("contrastive", "fsdp"), [("softmax", False), ("softmax", True), ("sigmoid", True)]
)
def test_steps_do_not_depend_on_the_devices_or_on_what_saves_memory(
    model, batch, one_device, contrastive, fsdp
):
    """With fsdp also in microbatches, blocks and rematerialised layers."""
    start, expected_history, expected = one_device[contrastive]
    model = dataclasses.replace(model, **(BLOCKS if fsdp else {}))
    loss = LossConfig() if contrastive == "softmax" else SIGMOID
    trainer = Trainer(model, start, 8, loss, fsdp=fsdp, microbatch=8 * fsdp)
    history = trainer.run(batch)
    for step, expected_step in zip(history, expected_history, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-4)
    assert history[-1]["loss"] < history[0]["loss"]
    assert int(trainer.state.step) == STEPS
    found = jax.device_get(trainer.state.params)
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        difference = np.abs(other - leaf).max() / max(np.abs(leaf).max(), 1e-2)
        assert difference < 1e-4, (jax.tree_util.keystr(path), difference)
    for tree in (trainer.state.params, trainer.state.opt_state) if fsdp else ():
        leaves = jax.tree.leaves(tree)
        held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
        # Nearly an eighth: what is too small to split is on every device.
        assert held < 0.3 * sum(leaf.size for leaf in leaves)


def test_the_sigmoid_loss_is_of_similarities_with_a_scale_and_a_bias(model, batch, one_device):
    params, history, _ = one_device["sigmoid"]
    assert history[0]["logit_bias"] == INITIAL_LOGIT_BIAS != history[-1]["logit_bias"]
    # Above CLIP's bound.
    assert history[0]["logit_scale"] == pytest.approx(117.33)
    assert min(step["logit_scale"] for step in history) > 101
    steps = make_embed_steps(model, make_layout(jax.devices()[:1]))
    text = steps.encode_text(params, batch["text_ids"], batch["text_mask"])
    video = steps.encode_video(params, batch["frames"], batch["frame_mask"])
    logits = 117.33 * np.asarray(steps.similarity(params, text, video)) + INITIAL_LOGIT_BIAS
    margin = (2 * np.eye(B) - 1) * logits
    expected = np.logaddexp(0, -margin).sum() / B
    assert history[0]["contrastive_loss"] == pytest.approx(expected, rel=1e-4)


def test_the_softmax_loss_bounds_the_temperature():
    params = {"backbone": {"logit_scale": jnp.float32(MAX_LOGIT_SCALE)}}
    tx = optax.sgd(1.0)
    state = TrainState(jnp.int32(0), params, tx.init(params))
    for gradient, expected in ((-0.5, MAX_LOGIT_SCALE), (0.5, MAX_LOGIT_SCALE - 0.5)):
        grads = {"backbone": {"logit_scale": jnp.float32(gradient)}}
        found = apply_gradients(state, grads, tx).params["backbone"]["logit_scale"]
        assert float(found) == pytest.approx(expected)


def test_norms_and_entropies_are_those_of_numpy(model, params, batch, one_device):
    trainer = Trainer(model, params, 1, norms_every=2)
    (first,) = trainer.run(batch, steps=1)
    before = jax.device_get(trainer.state.params)
    (second,) = trainer.run(batch, steps=1)
    update = jax.tree.map(np.subtract, jax.device_get(trainer.state.params), before)
    assert np.isnan([first["param_norm"], first["update_norm_new"]]).all()
    assert second == pytest.approx(one_device["softmax"][1][1], rel=1e-6)

    def norm(tree):
        return np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree)))

    for name, tree in (("param_norm", before), ("update_norm", update)):
        new = {group: leaves for group, leaves in tree.items() if group != "backbone"}
        assert second[name] == pytest.approx(norm(tree), rel=1e-3)
        assert second[f"{name}_backbone"] == pytest.approx(norm(tree["backbone"]), rel=1e-3)
        assert second[f"{name}_new"] == pytest.approx(norm(new), rel=1e-3)

    encode = make_embed_steps(model, trainer.layout).encode_text
    text = encode(before, batch["text_ids"], batch["text_mask"])
    weights = np.asarray(text["text_weight"])
    entropy = -np.sum(weights * np.log(np.where(weights > 0, weights, 1)), axis=1).mean()
    assert second["word_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert 0 < second["frame_entropy"] < np.log(F)


# ---------------------------------------------------------------- gradients


def gradient(model, params, batch, loss=None, devices=1, *, fsdp=False, microbatch=0):
    """((loss, parts), gradients) of the program that a training step compiles."""
    layout = make_layout(jax.devices()[:devices], fsdp=fsdp)
    function = functools.partial(
        loss_and_parts,
        definition=model_definition(model),
        config=loss or LossConfig(),
        layout=layout,
        microbatch=microbatch,
    )
    compiled = jax.jit(
        jax.value_and_grad(function, has_aux=True),
        in_shardings=(layout.parameters(params), layout.batch_sharded, None),
    )
    return jax.device_get(compiled(params, layout.put_batch(batch), jax.random.key(1)))


@pytest.mark.parametrize(
    ("contrastive", "interaction", "dropout"),
    [("softmax", "xti", 0.0), ("sigmoid", "wti", 0.0), ("sigmoid", "xti", 0.1)],
)
def test_gradients_do_not_depend_on_blocks(model, batch, contrastive, interaction, dropout):
    """Blocks, microbatches, fsdp and 8 devices against none of them.

    Dropout depends on the block, so both sides have the same blocks there.
    """
    cdcr = 3 if interaction == "wti" else 0
    config = LossConfig(contrastive=contrastive, cdcr=cdcr, cdcr_lambda=0.1)
    model = dataclasses.replace(model, interaction=interaction, cross_dropout=dropout)
    params = random_params(model)
    # Near zero, so that every pair has a gradient that counts.
    params["backbone"]["logit_bias"] = jnp.float32(-3.0)
    in_blocks = dataclasses.replace(model, **BLOCKS)
    (_, parts), expected = gradient(in_blocks if dropout else model, params, batch, config)
    (_, found_parts), found = gradient(in_blocks, params, batch, config, 8, fsdp=True, microbatch=8)
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


def norms_of_differences(found, expected):
    """Of each parameter, relative to the norm of the expected gradient."""
    return [
        np.linalg.norm(np.float64(a) - b) / max(np.linalg.norm(b), 1e-6)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]


def test_gradients_of_other_precision_and_rematerialisation(model, params, batch):
    (loss, _), expected = gradient(model, params, batch)
    (_, _), found = gradient(dataclasses.replace(model, remat="none"), params, batch)
    assert model.remat == "dots"
    assert max(norms_of_differences(found, expected)) < 1e-5

    half = dataclasses.replace(model, dtype="bfloat16")
    (loss_of_half, _), one = gradient(half, params, batch)
    assert loss_of_half == pytest.approx(float(loss), rel=0.05)
    assert loss_of_half != loss
    assert {leaf.dtype.name for leaf in jax.tree.leaves(one)} == {"float32"}
    # Summed in float32 on 1 and 8 devices they differ as sums in another order do, by 1e-6 and
    # less, but where the bfloat16 value of a single row is rounded the other way. Summed in
    # bfloat16, a third of them differ by 1e-3 to 8e-3.
    _, eight = gradient(half, params, batch, devices=8)
    differences = norms_of_differences(eight, one)
    assert np.median(differences) < 1e-6
    assert max(differences) < 5e-4


# The last pair is of the size of SigLIP's.
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -1.0), (117.33, -12.93)])
@pytest.mark.parametrize("block", [0, 3, 10])
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


@pytest.mark.parametrize(
    ("contrastive", "interaction"), [("softmax", "wti"), ("sigmoid", "wti"), ("sigmoid", "xti")]
)
def test_collectives_and_memory_of_the_compiled_step(model, contrastive, interaction):
    """Videos are gathered once, rows of texts stay; no device has the full product or matrix."""
    loss = LossConfig(contrastive=contrastive, cdcr=3 if interaction == "wti" else 0)
    model = dataclasses.replace(model, interaction=interaction, similarity_block=BLOCK)
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
    if interaction == "wti":
        # A block of the token-wise product is there; all of it, even of a device's rows, is not.
        assert (BLOCK, F, ROWS, L) in found
        assert max(map(np.prod, found)) < ROWS * L * F * PAIRS / 10
