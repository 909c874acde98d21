"""Precision of the products of float32 arrays, in programs that are lowered for NVIDIA GPUs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from drl_jax.config import LossConfig, OptimConfig
from drl_jax.evaluation.embedder import make_embed_steps
from drl_jax.models.drl import abstract_params
from drl_jax.runtime.sharding import make_layout
from drl_jax.search.engine import SearchEngine
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import abstract_state, make_train_step

B, L, F = 8, 12, 4
ARRAY = r"tensor<[\dx]+x(\w+)>"
PRODUCT = re.compile(rf"dot_general .*precision = \[(\w+), (\w+)\].* : \({ARRAY}, {ARRAY}\)")


def precisions(program, *arguments):
    """The precisions of the products of two float32 arrays in a compiled function."""
    text = program.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    found = PRODUCT.findall(text)
    assert len(found) == text.count("stablehlo.dot_general")
    return {name for *names, left, right in found for name in names if left == right == "f32"}


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "HIGHEST"), ("tf32", "HIGH"), ("bfloat16", "HIGH")]
)
def test_float32_is_not_tf32_unless_it_is_named(tiny_model, dtype, expected):
    """HIGHEST is float32; XLA may take TF32 for HIGH, and for the default."""
    model = dataclasses.replace(tiny_model, dtype=dtype)
    layout = make_layout(jax.devices()[:1])
    size = model.backbone.image_resolution
    text_ids = jax.ShapeDtypeStruct((B, L), jnp.int32)
    text_mask, frame_mask, valid = (
        jax.ShapeDtypeStruct(shape, bool) for shape in ((B, L), (B, F), (B,))
    )
    frames = jax.ShapeDtypeStruct((B, F, size, size, 3), jnp.uint8)
    tx = make_optimizer(OptimConfig(), total_steps=20)
    step = make_train_step(model, LossConfig(), tx, layout)
    names = ("text_ids", "text_mask", "frames", "frame_mask")
    batch = dict(zip(names, (text_ids, text_mask, frames, frame_mask), strict=True))
    assert precisions(step, abstract_state(model, tx, layout), batch) == {expected}

    steps, params = make_embed_steps(model, layout), abstract_params(model, layout)
    text = jax.eval_shape(steps.encode_text, params, text_ids, text_mask)
    video = jax.eval_shape(steps.encode_video, params, frames, frame_mask)
    image_feat = jax.ShapeDtypeStruct((B, F, model.backbone.embed_dim), jnp.float32)
    compare = SearchEngine(model, params)._step(layout, B, 1, is_one=True)
    weights = jax.ShapeDtypeStruct((1,), jnp.float32)
    for program, *arguments in (
        (steps.encode_text, text_ids, text_mask),
        (steps.encode_video, frames, frame_mask),
        (steps.encode_image, jax.ShapeDtypeStruct((B, *frames.shape[2:]), jnp.uint8), valid),
        (steps.encode_window, image_feat, frame_mask),
        (steps.similarity, text, video),
        (compare, [text], weights, {**video, "valid": valid}),
    ):
        assert precisions(program, params, *arguments) == {expected}
