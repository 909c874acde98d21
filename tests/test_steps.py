"""One training step: the same on any number of devices, in any blocks; small memory, few bytes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.params import random_params

from benchmarks.hlo import collective_bytes
from drl_jax.config import LossConfig, OptimConfig
from drl_jax.evaluation.embedder import make_embed_steps
from drl_jax.models.drl import init_params, model_definition, param_shapes
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.optimizer import MAX_LOGIT_SCALE, make_optimizer
from drl_jax.training.train_step import (
    TrainState,
    abstract_state,
    apply_gradients,
    loss_and_parts,
    make_train_step,
    state_from_params,
)

B, L, F = 16, 12, 4
STEPS = 10


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "text_ids": rng.integers(1, 500, (B, L)).astype(np.int32),
        "text_mask": np.arange(L) < rng.integers(3, L + 1, (B, 1)),
        "frames": rng.integers(0, 256, (B, F, 64, 64, 3)).astype(np.uint8),
        "frame_mask": np.arange(F) < rng.integers(1, F + 1, (B, 1)),
    }


@pytest.fixture(scope="module")
def model(tiny_model):
    """With a small vocabulary: its rows are most of the optimiser's work."""
    backbone = dataclasses.replace(tiny_model.backbone, vocab_size=500)
    return dataclasses.replace(tiny_model, backbone=backbone, temporal_layers=1)


class Trainer:
    """A compiled step on some devices, and the state it starts from."""

    def __init__(self, model, params, devices, *, fsdp=False, **options):
        self.layout = make_layout(jax.devices()[:devices], fsdp=fsdp)
        tx = make_optimizer(OptimConfig(lr=1e-3, coef_lr=1.0), total_steps=20)
        self.state = state_from_params(params, tx, self.layout)
        self.step = make_train_step(model, LossConfig(), tx, self.layout, **options)

    def run(self, batch, steps=STEPS):
        history = []
        for _ in range(steps):
            self.state, scalars = self.step(self.state, self.layout.put_batch(batch))
            history.append({name: float(value) for name, value in scalars.items()})
        return history


@pytest.fixture(scope="module")
def params(model):
    """The model's own initialisation: the bounds below hold for parameters of its size."""
    return jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))


@pytest.fixture(scope="module")
def one_device(model, params, batch):
    trainer = Trainer(model, params, 1)
    return trainer.run(batch), jax.device_get(trainer.state)


def assert_same_run(trainer, history, expected):
    expected_history, expected_state = expected
    for step, expected_step in zip(history, expected_history, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-4)
    found = jax.device_get(trainer.state)
    assert int(found.step) == STEPS
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected_state.params):
        other = functools.reduce(lambda tree, entry: tree[entry.key], path, found.params)
        difference = np.abs(other - leaf).max() / max(np.abs(leaf).max(), 1e-2)
        assert difference < 1e-4, (jax.tree_util.keystr(path), difference)


@pytest.mark.parametrize("devices", [2, 8])
def test_ten_steps_do_not_depend_on_the_number_of_devices(
    model, params, batch, one_device, devices
):
    trainer = Trainer(model, params, devices)
    history = trainer.run(batch)
    assert_same_run(trainer, history, one_device)
    assert history[-1]["loss"] < history[0]["loss"]


def test_ten_steps_with_split_parameters_in_blocks(model, params, batch, one_device):
    """Everything that saves memory, together: fsdp, microbatches, blocks, rematerialised layers."""
    model = dataclasses.replace(model, similarity_block=5, remat="full")
    trainer = Trainer(model, params, 8, fsdp=True, microbatch=8)
    assert_same_run(trainer, trainer.run(batch), one_device)
    for tree in (trainer.state.params, trainer.state.opt_state):
        held, total = 0, 0
        for leaf in jax.tree.leaves(tree):
            total += leaf.size
            held += leaf.addressable_shards[0].data.size
        # Nearly an eighth: what is too small to split is on every device.
        assert held < 0.3 * total


def test_norms_and_entropies_are_those_of_numpy(model, params, batch, one_device):
    """The tests above compare those of one device with those of eight."""
    trainer = Trainer(model, params, 1, norms_every=2)
    (first,) = trainer.run(batch, steps=1)
    before = jax.device_get(trainer.state.params)
    (second,) = trainer.run(batch, steps=1)
    update = jax.tree.map(np.subtract, jax.device_get(trainer.state.params), before)
    assert np.isnan([first["param_norm"], first["update_norm_new"]]).all()
    assert second == pytest.approx(one_device[0][1], rel=1e-6)

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


def test_the_temperature_never_exceeds_100():
    params = {"backbone": {"logit_scale": jnp.float32(MAX_LOGIT_SCALE)}}
    tx = optax.sgd(1.0)
    state = TrainState(jnp.int32(0), params, tx.init(params))
    for gradient, expected in ((-0.5, MAX_LOGIT_SCALE), (0.5, MAX_LOGIT_SCALE - 0.5)):
        grads = {"backbone": {"logit_scale": jnp.float32(gradient)}}
        found = apply_gradients(state, grads, tx).params["backbone"]["logit_scale"]
        assert float(found) == pytest.approx(expected)


def gradient(model, params, batch, devices=1, **blocks):
    layout = make_layout(jax.devices()[:devices])
    loss = functools.partial(
        loss_and_parts,
        definition=model_definition(model),
        config=LossConfig(cdcr=0 if model.interaction == "xti" else 3),
        layout=layout,
        **blocks,
    )
    grad = jax.jit(jax.grad(loss, has_aux=True), in_shardings=(None, layout.batch_sharded, None))
    return jax.device_get(grad(params, layout.put_batch(batch), jax.random.key(1))[0])


@pytest.mark.parametrize(("interaction", "devices"), [("wti", 4), ("xti", 1)])
def test_blocks_do_not_change_the_gradient(model, batch, interaction, devices):
    model = dataclasses.replace(model, interaction=interaction, cross_dropout=0.0, cross_layers=1)
    params = random_params(model)
    plain = gradient(model, params, batch)
    blocks = dataclasses.replace(model, similarity_block=7, remat="full")
    found = gradient(blocks, params, batch, devices=devices, microbatch=8)
    whole = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(plain)))
    apart = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), found, plain)
    assert np.sqrt(sum(jax.tree.leaves(apart))) < 1e-5 * whole


def test_bfloat16_computes_near_float32_and_keeps_its_parameters(model, params, batch, one_device):
    half = Trainer(dataclasses.replace(model, dtype="bfloat16"), params, 1)
    history = half.run(batch)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.state.params)} == {"float32"}
    losses, expected = ([step["loss"] for step in run] for run in (history, one_device[0]))
    np.testing.assert_allclose(losses, expected, rtol=0.05)
    assert losses != expected


def test_bfloat16_gradients_are_summed_in_float32(model, params, batch):
    """On 1 and 8 devices they differ as float32 sums in another order do, by 1e-6 and less, but
    where the bfloat16 value of a single row is rounded the other way. Summed in bfloat16, a third
    of them differ by 1e-3 to 8e-3."""
    half = dataclasses.replace(model, dtype="bfloat16")
    one, eight = (gradient(half, params, batch, devices=devices) for devices in (1, 8))
    differences = jax.tree.map(
        lambda a, b: np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-6), eight, one
    )
    differences = jax.tree.leaves(differences)
    assert np.median(differences) < 1e-6
    assert max(differences) < 5e-4


@pytest.mark.parametrize("remat", ["none", "full"])
def test_rematerialisation_does_not_change_the_gradient(model, params, batch, remat):
    expected = gradient(model, params, batch)
    found = gradient(dataclasses.replace(model, remat=remat), params, batch)
    assert model.remat == "dots"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


def collectives(hlo):
    return set(re.findall(r"= \S+ (all-gather|all-reduce|all-to-all|reduce-scatter)", hlo))


def largest_array(hlo):
    """Elements of the largest array of one device's program."""
    shapes = re.findall(r"\b(?:f32|bf16|pred|s32|u8)\[([\d,]+)\]", hlo)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def compiled_step(model, pairs, words, frames, layout, microbatch=0):
    """The text of the compiled step, for images of one patch."""
    backbone = dataclasses.replace(model.backbone, image_resolution=16, vision_patch_size=16)
    model = dataclasses.replace(model, backbone=backbone)
    tx = make_optimizer(OptimConfig(), total_steps=20)
    step = make_train_step(model, LossConfig(), tx, layout, microbatch=microbatch)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct((pairs, *shape), dtype, sharding=layout.batch_sharded)

    batch = {
        "text_ids": array((words,), jnp.int32),
        "text_mask": array((words,), jnp.bool_),
        "frames": array((frames, 16, 16, 3), jnp.uint8),
        "frame_mask": array((frames,), jnp.bool_),
    }
    return step.lower(abstract_state(model, tx, layout), batch).compile().as_text()


def test_split_parameters_are_gathered_and_activations_stay(model):
    """The embedding table has 500 rows, so it is split by columns; a row stays on its device."""
    pairs, words, frames = 1024, 12, 4
    moved = collective_bytes(compiled_step(model, pairs, words, frames, make_layout(fsdp=True)))
    parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))
    # Features, weights and masks of all videos.
    features = pairs * frames * (4 * model.backbone.embed_dim + 4 + 1)
    assert set(moved) <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Parameters are gathered for the forward pass and again for the backward pass.
    assert moved["all-gather"] < features + 2 * parameters
    assert moved["all-reduce"] + moved.get("reduce-scatter", 0) < features + 2 * parameters


def test_collectives_and_memory_of_the_compiled_step(model):
    """On 8 devices: video features are gathered; no device has the full product or matrix."""
    pairs, words, frames = 1024, 12, 4
    model = dataclasses.replace(model, similarity_block=16)
    hlo = compiled_step(model, pairs, words, frames, make_layout(), microbatch=256)
    assert collectives(hlo) <= {"all-gather", "all-reduce", "reduce-scatter"}
    # What is gathered is the videos' features, masks and weights, and one number a pair.
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", hlo)
    width = model.backbone.embed_dim
    allowed = {(pairs, frames, width), (pairs, frames), (pairs,)}
    assert {tuple(map(int, shape.split(","))) for shape in gathered} <= allowed
    assert (pairs, frames, width) in {tuple(map(int, shape.split(","))) for shape in gathered}
    # Rows of the similarity matrix stay sharded: no device has the full matrix.
    assert f"[{pairs},{pairs}]" not in hlo
    assert f"[{pairs // 8},{pairs}]" in hlo
    # A block of the token-wise product is there; all of it, even of one device's rows, is not.
    product = words * frames * pairs // 8
    assert f"[16,{frames},{pairs // 8},{words}]" in hlo
    assert largest_array(hlo) < product * pairs / 10
