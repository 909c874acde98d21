"""One training step, and that it does not depend on the number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
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
        "text_ids": rng.integers(1, 500, (B, L)).astype(np.int32),
        "text_mask": np.arange(L) < rng.integers(3, L + 1, (B, 1)),
        "frames": rng.integers(0, 256, (B, F, 64, 64, 3)).astype(np.uint8),
        "frame_mask": np.arange(F) < rng.integers(1, F + 1, (B, 1)),
    }


@pytest.fixture(scope="module")
def model(tiny_model):
    """With a small vocabulary: its rows are most of the optimiser's work."""
    clip = dataclasses.replace(tiny_model.clip, vocab_size=500)
    return dataclasses.replace(tiny_model, clip=clip)


class Trainer:
    """A compiled step on some devices, and the state it starts from."""

    def __init__(self, model, devices):
        self.mesh = jax.sharding.Mesh(np.array(devices), ("data",))
        tx = make_optimizer(OptimConfig(lr=1e-3, coef_lr=1.0), total_steps=20)
        self.state = create_state(model, tx, 0, self.mesh)
        self._step = make_train_step(model, LossConfig(), tx, self.mesh)

    def run(self, batch, steps):
        history = []
        for _ in range(steps):
            self.state, scalars = self._step(self.state, shard_rows(batch, self.mesh))
            history.append({name: float(value) for name, value in scalars.items()})
        return history


def test_steps_on_one_and_on_eight_devices(model, batch):
    assert make_mesh().devices.size == 8
    eight, one = (Trainer(model, jax.devices()[:count]) for count in (8, 1))
    history = eight.run(batch, 4)
    for a, b in zip(one.run(batch, 4), history, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for a, b in zip(
        jax.tree.leaves(one.state.params), jax.tree.leaves(eight.state.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
    assert history[-1]["loss"] < history[0]["loss"]
    assert int(one.state.step) == 4

    # The temperature of CLIP never exceeds 100, wherever a step would take it.
    one.state.params["clip"]["logit_scale"] = jnp.float32(MAX_LOGIT_SCALE + 0.5)
    one.run(batch, 1)
    assert float(one.state.params["clip"]["logit_scale"]) == pytest.approx(MAX_LOGIT_SCALE)
