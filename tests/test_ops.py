import jax
import jax.numpy as jnp
import numpy as np

from drl_jax.models import ops


def test_l2_normalize_of_zero_is_zero_with_zero_gradient():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(ops.l2_normalize(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    gradient = jax.grad(lambda x: ops.l2_normalize(x)[:, 0].sum())(x)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], [0, 0])


def test_masked_softmax_ignores_what_is_masked():
    mask = jnp.array([[True, True, False]])
    one = ops.masked_softmax(jnp.array([[1.0, 2.0, 50.0]]), mask)
    np.testing.assert_allclose(one, [[0.26894142, 0.73105858, 0]], rtol=1e-6)
    assert one[0, 2] == 0


def test_mean_entropy():
    weights = jnp.array([[0.25, 0.25, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(ops.mean_entropy(weights), np.log(4) / 2, rtol=1e-6)


def test_masked_standardize_uses_the_unbiased_std_of_valid_rows():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(10, 4)).astype(np.float32)
    mask = np.arange(10) < 7
    valid = rows[:7]
    expected = (valid - valid.mean(0)) / valid.std(0, ddof=1)
    found = ops.masked_standardize(rows, mask)
    np.testing.assert_allclose(found[:7], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[7:], 0)


def test_masked_standardize_of_equal_rows_is_zero_with_zero_gradient():
    # 0.1 is not exact in binary: the mean of many differs from it by rounding.
    rows = jnp.concatenate([jnp.full((101, 1), 0.1), jnp.arange(101.0)[:, None]], axis=1)
    mask = jnp.ones(101, bool)
    found = ops.masked_standardize(rows, mask)
    np.testing.assert_array_equal(found[:, 0], 0)
    gradient = jax.grad(lambda r: (ops.masked_standardize(r, mask) ** 3).sum())(rows)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 0], 0)
