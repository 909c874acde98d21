"""The losses where `test_reference_parity.py` has no numbers, and the operations below them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax.models import ops
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.training.train_step import decorrelation_loss, softmax_loss

B, L, F, D = 5, 7, 4, 6


@pytest.fixture
def sides():
    """The arrays of matched texts and videos."""
    rng = np.random.default_rng(0)

    def arrays(name, lengths, positions):
        mask = np.arange(positions) < lengths[:, None]
        feat = rng.normal(size=(B, positions, D)).astype(np.float32)
        weight = rng.random(mask.shape).astype(np.float32) * mask
        return {
            f"{name}_unit": feat / np.linalg.norm(feat, axis=-1, keepdims=True),
            f"{name}_mask": mask,
            f"{name}_weight": weight / weight.sum(1, keepdims=True),
        }

    return (
        arrays("text", rng.integers(3, L + 1, B), L),
        arrays("frame", np.array([F, 1, 2, 3, F]), F),
    )


def cdcr_loss(text, video, key, cdcr):
    # The correlation needs no parameters.
    correlation = INTERACTIONS["wti"].channel_correlation(None, text, video, key, cdcr)
    return decorrelation_loss(correlation, 0.11, 0.1)


def test_softmax_loss_is_the_mean_cross_entropy_of_both_directions():
    logits = np.random.default_rng(0).normal(size=(B, B)).astype(np.float32)
    t2v = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    v2t = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    loss, parts = softmax_loss(logits)
    np.testing.assert_allclose(loss, (t2v.mean() + v2t.mean()) / 2, rtol=1e-6)
    np.testing.assert_allclose(parts["t2v_loss"], t2v.mean(), rtol=1e-6)
    np.testing.assert_allclose(parts["v2t_loss"], v2t.mean(), rtol=1e-6)


def test_cdcr_1_draws_valid_positions(sides):
    """What is masked is never drawn; what is drawn changes with the key."""
    for name, side in zip(("text", "frame"), sides, strict=True):
        side[f"{name}_unit"][~side[f"{name}_mask"]] = np.nan
    losses = [float(cdcr_loss(*sides, jax.random.key(n), cdcr=1)) for n in range(20)]
    assert np.isfinite(losses).all()
    assert len(set(losses)) > 10


@pytest.mark.parametrize("cdcr", [1, 2, 3])
def test_cdcr_stays_finite_where_all_rows_are_alike(sides, cdcr):
    """Every caption's first token has the same feature: picked by all, its std is zero."""
    text, video = sides
    alike = np.broadcast_to(text["text_unit"][:1, :1], (B, L, D))

    def loss(text_unit, frame_unit):
        arrays = {**text, "text_unit": text_unit}, {**video, "frame_unit": frame_unit}
        return cdcr_loss(*arrays, jax.random.key(0), cdcr)

    value, gradients = jax.value_and_grad(loss, (0, 1))(alike, video["frame_unit"])
    # No correlation with what does not vary: alpha1 for each channel.
    assert value == pytest.approx(0.11 * D)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_a_channel_is_constant_up_to_rounding():
    """0.1 is not exact in binary: the mean of many differs from it by rounding."""
    rows = jnp.concatenate([jnp.full((101, 1), 0.1), jnp.arange(101.0)[:, None]], axis=1)
    mask = jnp.ones(101, bool)
    np.testing.assert_array_equal(ops.masked_standardize(rows, mask)[:, 0], 0)
    gradient = jax.grad(lambda rows: (ops.masked_standardize(rows, mask) ** 3).sum())(rows)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 0], 0)


def test_the_unit_vector_of_zero_is_zero_with_zero_gradient():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(ops.l2_normalize(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    gradient = jax.grad(lambda x: ops.l2_normalize(x)[:, 0].sum())(x)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], [0, 0])
