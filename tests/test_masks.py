"""Masks hold for every interaction and head: what is masked changes nothing that is valid."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from support.params import random_params

from drl_jax.config import LossConfig
from drl_jax.models.drl import model_definition
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.train_step import loss_and_parts

L, F = 8, 4
B = 3


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "text_ids": rng.integers(1, 500, (B, L)).astype(np.int32),
        "text_mask": np.arange(L) < np.array([[8], [6], [3]]),
        "frames": rng.integers(0, 256, (B, F, 64, 64, 3)).astype(np.uint8),
        "frame_mask": np.arange(F) < np.array([[4], [2], [1]]),
    }


def with_noise(batch, *names):
    """The batch with other content wherever it is masked."""
    rng = np.random.default_rng(1)
    other = dict(batch)
    if "text_ids" in names:
        noise = rng.integers(1, 500, (B, L)).astype(np.int32)
        other["text_ids"] = np.where(batch["text_mask"], batch["text_ids"], noise)
    if "frames" in names:
        noise = rng.integers(0, 256, batch["frames"].shape).astype(np.uint8)
        shown = batch["frame_mask"][:, :, None, None, None]
        other["frames"] = np.where(shown, batch["frames"], noise)
    assert any(not np.array_equal(other[name], batch[name]) for name in names)
    return other


@pytest.fixture(
    scope="module",
    params=[("dp", "seqLSTM"), ("ti", "none"), ("wti", "seqTransf"), ("xti", "seqTransf")],
    ids="-".join,
)
def model(request, tiny_model):
    interaction, agg_module = request.param
    backbone = dataclasses.replace(tiny_model.backbone, vocab_size=500)
    return dataclasses.replace(
        tiny_model,
        backbone=backbone,
        interaction=interaction,
        agg_module=agg_module,
        temporal_layers=2,
    )


@pytest.fixture(scope="module")
def params(model):
    return random_params(model)


def test_no_valid_feature_and_no_similarity_changes(model, params, batch):
    definition = model_definition(model)

    @jax.jit
    def evaluate(params, batch):
        whole = nnx.merge(definition, params)
        text = whole.encode_text(batch["text_ids"], batch["text_mask"])
        video = whole.encode_video(batch["frames"], batch["frame_mask"])
        text_feat = whole.backbone.encode_text(batch["text_ids"], batch["text_mask"]).tokens
        frame_feat = whole.frame_features(batch["frames"], batch["frame_mask"])
        return text_feat, frame_feat, whole.similarity(text, video)

    text_1, frames_1, sim_1 = evaluate(params, batch)
    text_2, frames_2, sim_2 = evaluate(params, with_noise(batch, "text_ids", "frames"))
    np.testing.assert_array_equal(text_1[batch["text_mask"]], text_2[batch["text_mask"]])
    np.testing.assert_array_equal(frames_1[batch["frame_mask"]], frames_2[batch["frame_mask"]])
    np.testing.assert_array_equal(sim_1, sim_2)
    assert not np.array_equal(text_1, text_2)  # the noise was there


def test_masked_frames_change_no_gradient(model, params, batch):
    """Their pixels become 0 before the tower; that it sees a black frame is the only trace."""
    loss = functools.partial(
        loss_and_parts,
        definition=model_definition(model),
        config=LossConfig(cdcr=max(INTERACTIONS[model.interaction].CDCR_VARIANTS)),
        layout=make_layout(jax.devices()[:1]),
    )
    gradient = jax.jit(jax.grad(lambda p, b: loss(p, b, jax.random.key(0))[0]))
    one, other = gradient(params, batch), gradient(params, with_noise(batch, "frames"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(one)) > 0
