"""The model: masks hold for every interaction and head; positions, sizes, and what is computed."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.params import random_batch, random_params

from drl_jax.config import LoRAConfig, LossConfig, ModelConfig
from drl_jax.models.drl import copy_text_tower, model_definition, param_shapes
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.layers import BlockConfig, Transformer, new_block_init
from drl_jax.models.linear import Linear
from drl_jax.models.temporal import SequenceTransformer
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.train_step import loss_and_parts


def with_noise(batch, name, mask):
    """The batch with other content of an array wherever it is masked."""
    content, rng = batch[name], np.random.default_rng(1)
    noise = rng.integers(0, 256, content.shape).astype(content.dtype)
    shown = batch[mask].reshape(*batch[mask].shape, *[1] * (content.ndim - 2))
    other = {**batch, name: np.where(shown, content, noise)}
    assert not np.array_equal(other[name], content)
    return other


@pytest.mark.parametrize(
    ("interaction", "agg_module"),
    [*zip(INTERACTIONS, itertools.cycle(["seqLSTM", "none", "seqTransf", "seqTransf"]))],
)
def test_what_padding_holds_changes_nothing_that_is_valid(tiny_model, interaction, agg_module):
    """No valid feature, no similarity, and no gradient.

    Pixels of masked frames become 0 before the tower; that it sees a black frame is the only trace.
    Captions need no mask in CLIP's text tower: causal attention never looks at the padding.
    """
    backbone = dataclasses.replace(tiny_model.backbone, vocab_size=500, image_resolution=32)
    model = dataclasses.replace(
        tiny_model,
        backbone=backbone,
        interaction=interaction,
        agg_module=agg_module,
        temporal_layers=2,
        cross_layers=2,
    )
    definition, params = model_definition(model), random_params(model)
    loss = functools.partial(
        loss_and_parts,
        definition=definition,
        config=LossConfig(cdcr=max(INTERACTIONS[interaction].CDCR_VARIANTS)),
        layout=make_layout(jax.devices()[:1]),
    )

    @jax.jit
    def compute(batch):
        whole = nnx.merge(definition, params)
        text = whole.encode_text(batch["text_ids"], batch["text_mask"])
        video = whole.encode_video(batch["frames"], batch["frame_mask"])
        text_feat = whole.backbone.encode_text(batch["text_ids"], batch["text_mask"]).tokens
        frame_feat = whole.frame_features(batch["frames"], batch["frame_mask"])
        gradient = jax.grad(loss, has_aux=True)(params, batch, jax.random.key(0))[0]
        return text_feat, frame_feat, whole.similarity(text, video), gradient

    batch = random_batch(3, 8, 4, 32)
    text, frames, similarity, gradient = jax.device_get(compute(batch))
    noisy = with_noise(batch, "frames", "frame_mask")
    _, other_frames, other_similarity, other_gradient = jax.device_get(compute(noisy))
    valid = batch["frame_mask"]
    np.testing.assert_array_equal(frames[valid], other_frames[valid])
    np.testing.assert_array_equal(similarity, other_similarity)
    jax.tree.map(np.testing.assert_array_equal, gradient, other_gradient)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0

    noisy = with_noise(batch, "text_ids", "text_mask")
    other_text, _, other_similarity, _ = jax.device_get(compute(noisy))
    valid = batch["text_mask"]
    np.testing.assert_array_equal(text[valid], other_text[valid])
    assert not np.array_equal(text, other_text)
    np.testing.assert_array_equal(similarity, other_similarity)


def test_new_frame_positions_have_the_configured_deviation(tiny_model):
    config = dataclasses.replace(tiny_model, position_std=0.5)
    head = SequenceTransformer(config, rngs=nnx.Rngs(0))
    assert 0.45 < head.frame_position_embeddings.embedding[...].std() < 0.55
    # And are not replaced by a copy of the text tower's.
    params = random_params(config)
    kept = copy_text_tower(config, params)["temporal"]["frame_position_embeddings"]
    assert kept is params["temporal"]["frame_position_embeddings"]


def test_a_transformer_computes_only_the_positions_that_are_needed(tiny_model):
    run = dataclasses.replace(tiny_model, remat="full")
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


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_parts_of_a_linear_layer_are_those_of_its_result(monkeypatch, dtype, tolerance, rank):
    """Values and gradients, with and without an adapter, in a program as GPUs have it."""
    layer = Linear(8, 12, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    if rank:
        layer.add_adapter(LoRAConfig(rank=rank), "in_proj", rngs=nnx.Rngs(1))
    definition, params = nnx.split(layer)
    params = jax.tree.map(lambda x: x + 0.1, params)
    x, y = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    scale = jnp.arange(1.0, 4.0)

    def whole(params, x, y):
        of_x, of_y = (jnp.split(nnx.merge(definition, params)(z), 3, axis=-1) for z in (x, y))
        return jnp.stack([of_y[0], *of_x[1:]])

    def in_parts(params, x, y):
        return jnp.stack(nnx.merge(definition, params).parts(y, x, x))

    def gradient(function):
        def loss(*arguments):
            return jnp.einsum("p,pbtd->", scale, jnp.sin(function(*arguments).astype(float)))

        return jax.grad(loss, (0, 1, 2))(params, x, y)

    expected = whole(params, x, y), gradient(whole), whole(params, x, x)
    monkeypatch.setattr("drl_jax.models.linear.is_on_cpu", lambda: False)
    found = in_parts(params, x, y), gradient(in_parts), in_parts(params, x, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance),
        *(jax.tree.map(lambda a: np.asarray(a, float), tree) for tree in (found, expected)),
    )


def test_vit_b32_has_its_published_size():
    shapes = param_shapes(ModelConfig())

    def count(tree):
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    assert count(shapes["backbone"]) == 151_277_313  # OpenAI's ViT-B/32
    assert count(shapes["temporal"]["transformer"]) == 4 * 3_152_384
