"""The losses against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.interactions.token_wise import weighted_token_wise
from drl_jax.training.train_step import decorrelation_loss, softmax_loss

B, L, F, D = 5, 7, 4, 6


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    text_mask = np.arange(L) < rng.integers(3, L + 1, (B, 1))
    frame_mask = np.arange(F) < rng.integers(1, F + 1, (B, 1))
    frame_mask[0] = True

    def weights(mask):
        raw = rng.random(mask.shape) * mask
        return (raw / raw.sum(1, keepdims=True)).astype(np.float32)

    return {
        "text_unit": unit(rng.normal(size=(B, L, D)).astype(np.float32)),
        "frame_unit": unit(rng.normal(size=(B, F, D)).astype(np.float32)),
        "text_mask": text_mask,
        "frame_mask": frame_mask,
        "text_weight": weights(text_mask),
        "frame_weight": weights(frame_mask),
    }


def sides(f):
    """The features as the interaction's arrays of texts and of videos."""
    text = {name: f[name] for name in ("text_unit", "text_mask", "text_weight")}
    video = {name: f[name] for name in ("frame_unit", "frame_mask", "frame_weight")}
    return text, video


def cdcr_loss(text, video, key, *, cdcr, alpha1, alpha2, interaction="wti"):
    """The penalty of an interaction's channel correlation."""
    # The correlation needs no parameters.
    correlate = INTERACTIONS[interaction].channel_correlation
    return decorrelation_loss(correlate(None, text, video, key, cdcr), alpha1, alpha2)


def reference_cdcr(f, cdcr, alpha1, alpha2):
    """Variants 2 and 3 as the reference computes them, with its [N, D, D] tensor."""
    text, frame = f["text_unit"], f["frame_unit"]
    sim = np.einsum("bld,bfd->blf", text, frame)
    sim = sim * f["text_mask"][:, :, None] * f["frame_mask"][:, None]

    def correlation(own, partner, weight):
        def z(rows):
            return (rows - rows.mean(0)) / rows.std(0, ddof=1)

        tensor = np.einsum("nc,nd->ncd", z(own), z(partner))
        return tensor.mean(0) if cdcr == 2 else np.einsum("ncd,n->cd", tensor, weight) / B

    rows = np.argwhere(f["text_mask"])
    own = np.array([text[b, k] for b, k in rows])
    partner = np.array([frame[b, sim[b, k].argmax()] for b, k in rows])
    by_token = correlation(own, partner, f["text_weight"][f["text_mask"]])
    rows = np.argwhere(f["frame_mask"])
    own = np.array([frame[b, k] for b, k in rows])
    partner = np.array([text[b, sim[b, :, k].argmax()] for b, k in rows])
    by_frame = correlation(own, partner, f["frame_weight"][f["frame_mask"]])
    c = (by_token + by_frame) / 2
    on = ((np.diag(c) - 1) ** 2).sum()
    return alpha1 * on + alpha2 * ((c**2).sum() - (np.diag(c) ** 2).sum())


def test_softmax_loss_is_the_mean_cross_entropy_of_both_directions():
    logits = np.random.default_rng(0).normal(size=(B, B)).astype(np.float32)
    t2v = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    v2t = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    loss, parts = softmax_loss(logits)
    np.testing.assert_allclose(loss, (t2v.mean() + v2t.mean()) / 2, rtol=1e-6)
    np.testing.assert_allclose(parts["t2v_loss"], t2v.mean(), rtol=1e-6)
    np.testing.assert_allclose(parts["v2t_loss"], v2t.mean(), rtol=1e-6)


def test_weighted_token_wise_loops_over_pairs(features):
    f = features
    text, frame = f["text_unit"], f["frame_unit"]
    expected = np.zeros((B, B))
    for a in range(B):
        for b in range(B):
            sim = text[a] @ frame[b].T
            sim = sim * f["text_mask"][a][:, None] * f["frame_mask"][b][None]
            t2v = (sim.max(1) * f["text_weight"][a]).sum()
            v2t = (sim.max(0) * f["frame_weight"][b]).sum()
            expected[a, b] = (t2v + v2t) / 2
    np.testing.assert_allclose(weighted_token_wise(f, f), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cdcr", [2, 3])
def test_cdcr_matches_the_tensor_of_the_reference(features, cdcr):
    found = cdcr_loss(*sides(features), jax.random.key(0), cdcr=cdcr, alpha1=0.5, alpha2=0.25)
    np.testing.assert_allclose(found, reference_cdcr(features, cdcr, 0.5, 0.25), rtol=1e-5)


def test_cdcr_of_vectors(features):
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=(B, D)).astype(np.float32) for _ in range(2))
    za, zb = ((x - x.mean(0)) / x.std(0, ddof=1) for x in (a, b))
    c = za.T @ zb / B
    on = ((np.diag(c) - 1) ** 2).sum()
    expected = 0.5 * on + 0.25 * ((c**2).sum() - (np.diag(c) ** 2).sum())
    for cdcr in (1, 2, 3):
        found = cdcr_loss(
            {"sentence_unit": a},
            {"video_unit": b},
            jax.random.key(0),
            cdcr=cdcr,
            alpha1=0.5,
            alpha2=0.25,
            interaction="dp",
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_cdcr_1_draws_valid_positions(features):
    """What is masked is never drawn; what is drawn changes with the key."""
    f = dict(features)
    f["text_unit"] = np.where(f["text_mask"][..., None], f["text_unit"], np.nan)
    f["frame_unit"] = np.where(f["frame_mask"][..., None], f["frame_unit"], np.nan)
    losses = [
        float(cdcr_loss(*sides(f), jax.random.key(n), cdcr=1, alpha1=1.0, alpha2=0.1))
        for n in range(20)
    ]
    assert np.isfinite(losses).all()
    assert len(set(losses)) > 10


@pytest.mark.parametrize("cdcr", [1, 2, 3])
def test_cdcr_stays_finite_where_all_rows_are_alike(features, cdcr):
    """Every caption's first token has the same feature: picked by all, its std is zero."""
    f = dict(features)
    f["text_unit"] = np.broadcast_to(f["text_unit"][:1, :1], (B, L, D))

    def loss(text_unit, frame_unit):
        g = {**f, "text_unit": text_unit, "frame_unit": frame_unit}
        return cdcr_loss(*sides(g), jax.random.key(0), cdcr=cdcr, alpha1=0.11, alpha2=0.1)

    value, gradients = jax.value_and_grad(loss, (0, 1))(
        jnp.asarray(f["text_unit"]), jnp.asarray(f["frame_unit"])
    )
    # No correlation with what does not vary: alpha1 for each channel.
    assert value == pytest.approx(0.11 * D)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)
