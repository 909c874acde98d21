"""The towers and the whole model on a tiny configuration."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from support.params import random_params

from drl_jax.models.drl import copy_text_tower, init_params, model_definition, param_shapes
from drl_jax.models.layers import BlockConfig, BlockRunConfig, Transformer, new_block_init
from drl_jax.models.temporal import SequenceTransformer

L, F = 10, 4


@pytest.fixture(scope="module")
def params(tiny_model):
    return random_params(tiny_model)


@pytest.fixture(scope="module")
def encoders(tiny_model):
    definition = model_definition(tiny_model)

    @jax.jit
    def encode_text(params, ids, mask):
        return nnx.merge(definition, params).encode_text(ids, mask)

    @jax.jit
    def encode_video(params, frames, mask):
        return nnx.merge(definition, params).encode_video(frames, mask)

    @jax.jit
    def similarity(params, text, video):
        return nnx.merge(definition, params).similarity(text, video)

    return encode_text, encode_video, similarity


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "text_ids": rng.integers(1, 40000, (3, L)).astype(np.int32),
        "text_mask": np.arange(L) < np.array([[10], [6], [3]]),
        "frames": rng.integers(0, 256, (3, F, 64, 64, 3)).astype(np.uint8),
        "frame_mask": np.arange(F) < np.array([[4], [2], [1]]),
    }


def test_shapes(params, encoders, batch):
    text = encoders[0](params, batch["text_ids"], batch["text_mask"])
    video = encoders[1](params, batch["frames"], batch["frame_mask"])
    assert text["text_unit"].shape == (3, L, 32)
    assert video["frame_unit"].shape == (3, F, 32)
    np.testing.assert_allclose(text["text_weight"].sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(video["frame_weight"].sum(1), 1, rtol=1e-6)
    assert encoders[2](params, text, video).shape == (3, 3)


def test_text_attention_is_causal(params, encoders, batch):
    changed = batch["text_ids"].copy()
    changed[:, 5:] += 1
    mask = np.ones_like(batch["text_mask"])
    one = encoders[0](params, batch["text_ids"], mask)["text_unit"]
    other = encoders[0](params, changed, mask)["text_unit"]
    np.testing.assert_array_equal(one[:, :5], other[:, :5])
    assert not np.allclose(one[:, 5:], other[:, 5:])


def test_what_padding_holds_changes_no_similarity(params, encoders, batch):
    """Captions need no mask in the text tower: causal attention never looks at the padding."""
    changed = dict(batch)
    changed["text_ids"] = np.where(batch["text_mask"], batch["text_ids"], 7)
    padded_frames = ~batch["frame_mask"][:, :, None, None, None]
    changed["frames"] = np.where(padded_frames, np.uint8(99), batch["frames"])
    one, other = (
        encoders[2](
            params,
            encoders[0](params, arrays["text_ids"], arrays["text_mask"]),
            encoders[1](params, arrays["frames"], arrays["frame_mask"]),
        )
        for arrays in (batch, changed)
    )
    assert not np.array_equal(batch["text_ids"], changed["text_ids"])
    np.testing.assert_array_equal(one, other)


def test_the_temporal_head_sees_the_order_of_frames(params, encoders, batch):
    mask = np.ones_like(batch["frame_mask"])
    forward = encoders[1](params, batch["frames"], mask)["frame_unit"]
    backward = encoders[1](params, batch["frames"][:, ::-1], mask)["frame_unit"]
    assert np.abs(forward - backward[:, ::-1]).max() > 1e-4


def test_the_temporal_head_starts_as_a_copy_of_the_text_tower(tiny_model):
    init = jax.jit(init_params, static_argnums=0)
    params = init(tiny_model, jax.random.key(0))
    text, temporal = params["backbone"], params["temporal"]
    # To the last bits: a compiler may draw the random numbers of a copy again.
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    equal(temporal["frame_position_embeddings"]["embedding"], text["positional_embedding"])
    old = jax.tree.leaves(text["transformer"]["resblocks"])
    new = jax.tree.leaves(temporal["transformer"]["resblocks"])
    for a, b in zip(old, new, strict=True):
        equal(a, b[:2])  # the text tower has two blocks, the head three


def test_new_frame_positions_have_the_configured_deviation(tiny_model):
    config = dataclasses.replace(tiny_model, position_std=0.5)
    head = SequenceTransformer(config, rngs=nnx.Rngs(0))
    assert 0.45 < head.frame_position_embeddings.embedding[...].std() < 0.55
    # And are not replaced by a copy of the text tower's.
    params = random_params(config)
    kept = copy_text_tower(config, params)["temporal"]["frame_position_embeddings"]
    assert kept is params["temporal"]["frame_position_embeddings"]


def test_a_transformer_computes_only_the_positions_that_are_needed(tiny_model):
    run = BlockRunConfig.of(dataclasses.replace(tiny_model, remat="full"))
    block = BlockConfig(width=32, heads=2, hidden_width=128, activation="quick_gelu", eps=1e-5)
    make = functools.partial(Transformer, block, 3, init=new_block_init(), run=run)
    definition, params = nnx.split(make(rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 5, 32))

    def total(params, x, queries):
        y = nnx.merge(definition, params)(x, queries=queries)
        assert y.shape == (2, queries or 5, 32)
        return (y[:, :2] ** 2).sum()

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6),
        gradient(params, x, 2),
        gradient(params, x, None),
    )


def test_vit_b32_has_its_published_size():
    from drl_jax.config import ModelConfig

    shapes = param_shapes(ModelConfig())

    def count(tree):
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    assert count(shapes["backbone"]) == 151_277_313  # OpenAI's ViT-B/32
    assert count(shapes["temporal"]["transformer"]) == 4 * 3_152_384
