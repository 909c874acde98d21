"""FLOPs of a step: those of the formula, whatever is computed again; peak rates of devices."""

import dataclasses

import pytest

from drl_jax.config import LossConfig
from drl_jax.training.flops import peak_flops, train_step_flops

B, F, L = 8, 4, 12


def test_the_count_is_that_of_the_formula(tiny_model):
    """Products of activations and parameters, three times: forward, and two in the backward pass,
    but one for patches, whose pixels have no gradient. Of a model whose products are few."""
    model = dataclasses.replace(tiny_model, interaction="dp", agg_module="none")
    backbone, width = model.backbone, model.backbone.vision_width
    patches = (backbone.image_resolution // backbone.vision_patch_size) ** 2
    tokens = patches + 1

    def layer(queries, keys, width):
        linear = 2 * (keys * 2 * width**2 + queries * 10 * width**2)
        return linear + 2 * 2 * queries * keys * width

    # Of the last layer, the class token alone is a query.
    image = (backbone.vision_layers - 1) * layer(tokens, tokens, width) + layer(1, tokens, width)
    image += 2 * width * backbone.embed_dim
    text = backbone.text_layers * layer(L, L, backbone.text_width)
    text += 2 * L * backbone.text_width * backbone.embed_dim
    products = 3 * (B * (F * image + text) + 2 * B * B * backbone.embed_dim)
    products += 2 * B * F * 2 * patches * 3 * backbone.vision_patch_size**2 * width
    found = train_step_flops(model, LossConfig(cdcr=0), B, F, L)
    assert found == pytest.approx(products, rel=0.02)


def test_what_is_computed_again_does_not_count(tiny_model):
    expected = train_step_flops(tiny_model, LossConfig(), B, F, L)
    again = dataclasses.replace(
        tiny_model, remat="full", similarity_block=3, scan_unroll=2, dtype="bfloat16"
    )
    assert train_step_flops(again, LossConfig(), B, F, L) == expected


def test_peak_rates():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == pytest.approx(989.5e12)
    # float32 is not TF32 (`Layout.on_mesh`).
    assert peak_flops("NVIDIA A100-SXM4-40GB", "tf32") == pytest.approx(156e12)
    assert peak_flops("NVIDIA A100-SXM4-40GB", "float32") == pytest.approx(19.5e12)
    assert peak_flops("cpu", "float32") is None
