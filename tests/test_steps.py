"""One training step, and that it does not depend on the number of devices."""

import dataclasses

import jax
import numpy as np
import pytest

from drl_jax.config import LossConfig, OptimConfig
from drl_jax.optim import MAX_LOGIT_SCALE, make_optimizer
from drl_jax.sharding import make_mesh, shard_rows
from drl_jax.state import create_state
from drl_jax.steps import make_train_step

B, L, F = 16, 12, 4


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "text_ids": rng.integers(1, 40000, (B, L)).astype(np.int32),
        "text_mask": np.arange(L) < rng.integers(3, L + 1, (B, 1)),
        "frames": rng.integers(0, 256, (B, F, 64, 64, 3)).astype(np.uint8),
        "frame_mask": np.arange(F) < rng.integers(1, F + 1, (B, 1)),
    }


def run(model, batch, mesh, steps, optim):
    tx = make_optimizer(optim, total_steps=20)
    state = create_state(model, tx, 0, mesh)
    step = make_train_step(model, LossConfig(), tx, mesh)
    history = []
    for _ in range(steps):
        state, scalars = step(state, shard_rows(batch, mesh))
        history.append({name: float(value) for name, value in scalars.items()})
    return state, history


def test_one_and_eight_devices_agree(tiny_model, batch):
    optim = OptimConfig(lr=1e-3, coef_lr=1.0)
    assert jax.device_count() == 8
    one_device = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    one_device = jax.sharding.Mesh(one_device.devices, ("data",))
    state_8, history_8 = run(tiny_model, batch, make_mesh(), 4, optim)
    state_1, history_1 = run(tiny_model, batch, one_device, 4, optim)
    for a, b in zip(history_1, history_8, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for a, b in zip(jax.tree.leaves(state_1.params), jax.tree.leaves(state_8.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
    assert history_8[-1]["loss"] < history_8[0]["loss"]
    assert int(state_8.step) == 4


def test_the_temperature_stays_below_its_limit(tiny_model, batch):
    optim = OptimConfig(lr=5.0, coef_lr=1.0, warmup_proportion=0.0, weight_decay=0.0)
    mesh = make_mesh()
    tx = make_optimizer(optim, total_steps=20)
    state = create_state(dataclasses.replace(tiny_model), tx, 0, mesh)
    step = make_train_step(tiny_model, LossConfig(), tx, mesh)
    for _ in range(3):
        state, _ = step(state, shard_rows(batch, mesh))
        assert float(state.params["clip"]["logit_scale"]) <= MAX_LOGIT_SCALE + 1e-6
