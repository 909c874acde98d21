"""The towers of each family against their publishers' code (`DRL_TOWERS`)."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from drl_jax.config import ModelConfig
from drl_jax.models.drl import BACKBONES, model_definition, param_shapes
from drl_jax.weights.load import config_of_weights, params_from_state
from drl_jax.weights.weights_file import Weights, read_weights, save_weights

TOWERS = Path(os.environ.get("DRL_TOWERS") or Path(__file__).parents[2] / "shared" / "towers")
NAMES = sorted(path.parent.name for path in TOWERS.glob("*/io.npz"))
# Of features of norm about 1 to 10; gelu and gelu_tanh differ by up to 1e-4.
TOLERANCE = 2e-5

pytestmark = pytest.mark.skipif(not NAMES, reason="no goldens of towers (DRL_TOWERS)")


def backbone_shapes(config: ModelConfig) -> dict:
    return {"backbone": param_shapes(config)["backbone"]}


def backbone_of(weights: Weights) -> nnx.Module:
    """The towers of a file as a module."""
    backbone = weights.description.backbone
    config = ModelConfig(backbone=backbone, interaction="dp", agg_module="none")
    assert not BACKBONES[backbone.family].config_error(backbone)
    params = params_from_state(weights.state, backbone_shapes(config))
    return nnx.merge(model_definition(config), params | {"interaction": {}}).backbone


def encode_pixels(backbone: nnx.Module, pixels: np.ndarray) -> np.ndarray:
    """Normalised pixels [N, 3, H, W] -> image features."""
    count, _, height, width = pixels.shape
    patch = backbone.visual.patch_size
    x = pixels.transpose(0, 2, 3, 1)
    x = x.reshape(count, height // patch, patch, width // patch, patch, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, patch * patch, 3)
    return np.asarray(backbone.visual.pool(backbone.visual.embed_pixels(jnp.asarray(x))))


def mask_of(text_ids: np.ndarray, family: str) -> np.ndarray:
    """SigLIP pools the last position; CLIP and PE that of the highest id (EOS)."""
    if family == "siglip":
        return np.ones(text_ids.shape, bool)
    return np.arange(text_ids.shape[1]) <= text_ids.argmax(1)[:, None]


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    folder = TOWERS / request.param
    with np.load(folder / "io.npz") as io:
        return read_weights(folder / "weights.safetensors"), dict(io), folder


def test_parity(golden):
    weights, io, _ = golden
    backbone, ids = backbone_of(weights), io["text_ids"].astype(np.int32)
    text = backbone.encode_text(ids, mask_of(ids, weights.description.backbone.family))
    found = {
        "image_features": encode_pixels(backbone, io["pixels"]),
        "text_tokens": text.tokens,
        "text_features": text.sentence,
    }
    for name, features in found.items():
        np.testing.assert_allclose(features, io[name], rtol=0, atol=TOLERANCE, err_msg=name)


def test_captions_have_the_publishers_length(golden):
    """Of 77 tokens of CLIP, a golden caption has up to 70."""
    weights, io, _ = golden
    assert config_of_weights(weights).data.max_words == io["text_ids"].shape[1]


def test_export_has_the_publishers_names_and_bits(golden, tmp_path):
    weights, _, folder = golden
    config = config_of_weights(weights)
    params = {
        "backbone": params_from_state(weights.state, backbone_shapes(config.model))["backbone"]
    }
    exported = tmp_path / "towers.safetensors"
    save_weights(exported, params, config, dtype="float16", clip_only=True)
    original, found = load_file(folder / "weights.safetensors"), load_file(exported)
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
