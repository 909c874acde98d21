"""BertAdam against a line-by-line NumPy version of the reference."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest

from drl_jax.config import OptimConfig
from drl_jax.models.drl import param_shapes
from drl_jax.training.optimizer import decays, make_optimizer, make_schedule, parameter_group


def bert_adam_factor(step: int, total: int, warmup: float) -> float:
    """What BertAdam multiplies the learning rate by (`warmup_cosine`), in Python floats."""
    x = step / total
    return x / warmup if x < warmup else 0.5 * (1 + math.cos(math.pi * x))


def test_five_steps_equal_bert_adam():
    config = OptimConfig(lr=0.1, coef_lr=0.5)
    total = 10
    rng = np.random.default_rng(0)
    params = {
        "backbone": {"kernel": rng.normal(size=(3, 2)).astype(np.float32)},
        "head": {"bias": rng.normal(size=4).astype(np.float32)},
    }
    tx = make_optimizer(config, total)
    state = tx.init(params)
    expected = jax.tree.map(lambda x: x.astype(np.float64), params)
    m = jax.tree.map(np.zeros_like, expected)
    v = jax.tree.map(np.zeros_like, expected)
    found = params
    for step in range(5):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        updates, state = tx.update(grads, state, found)
        found = optax.apply_updates(found, updates)

        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        factor = bert_adam_factor(step, total, 0.1)
        for group, name, lr, decay in (
            ("backbone", "kernel", 0.05, 0.2),
            ("head", "bias", 0.1, 0.0),
        ):
            g = grads[group][name] * min(1.0, 1 / (norm + 1e-6))
            m[group][name] = 0.9 * m[group][name] + 0.1 * g
            v[group][name] = 0.98 * v[group][name] + 0.02 * g * g
            p = expected[group][name]
            update = m[group][name] / (np.sqrt(v[group][name]) + 1e-6) + decay * p
            expected[group][name] = p - lr * factor * update
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("total", [1, 20, 50, 100, 110, 330, 1230, 5000])
def test_every_step_has_the_learning_rate_of_bert_adam(total, warmup):
    """Compiled, also where warm-up ends and where the cosine is nearly 0."""
    schedule = jax.jit(jax.vmap(make_schedule(1.0, warmup, total)))
    expected = [bert_adam_factor(step, total, warmup) for step in range(total)]
    np.testing.assert_allclose(schedule(np.arange(total)), expected, rtol=1e-6)


def test_groups_and_decay_cover_every_parameter(tiny_model):
    backbone = dataclasses.replace(tiny_model.backbone, logit_bias=True)
    params = param_shapes(dataclasses.replace(tiny_model, backbone=backbone))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = {"/".join(str(entry.key) for entry in path): path for path in paths}
    backbone = {name for name, path in names.items() if parameter_group(path) == "backbone"}
    assert backbone == {name for name in names if name.startswith("backbone/")}
    assert {"backbone/logit_scale", "backbone/logit_bias"} <= backbone
    undecayed = {name for name, path in names.items() if not decays(path)}
    biases = {name for name in names if name.endswith("/bias")}
    assert undecayed == {*biases, "backbone/logit_bias"}
    # The reference decays LayerNorm's weights and the temperature.
    assert decays(names["backbone/logit_scale"])
    assert decays(names["backbone/visual/ln_pre/scale"])
