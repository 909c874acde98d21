"""BertAdam's schedule and groups; its arithmetic is compared in `test_reference_parity.py`."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from drl_jax.models.drl import param_shapes
from drl_jax.training.optimizer import decays, make_schedule, parameter_group


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


def test_groups_and_decay_cover_every_parameter(tiny_model):
    backbone = dataclasses.replace(tiny_model.backbone, logit_bias=True)
    params = param_shapes(dataclasses.replace(tiny_model, backbone=backbone))
    names = {
        "/".join(str(entry.key) for entry in path): path
        for path, _ in jax.tree.leaves_with_path(params)
    }
    backbone = {name for name, path in names.items() if parameter_group(path) == "backbone"}
    assert backbone == {name for name in names if name.startswith("backbone/")}
    undecayed = {name for name, path in names.items() if not decays(path)}
    # The reference decays LayerNorm's weights and the temperature.
    assert undecayed == {name for name in names if name.endswith(("/bias", "/logit_bias"))}
    assert {"backbone/logit_scale", "backbone/visual/ln_pre/scale"} <= names.keys() - undecayed
