"""The towers of each family against their publishers' code (`DRL_TOWERS`)."""

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from drl_jax.config import ACTIVATIONS, ModelConfig
from drl_jax.models.drl import BACKBONES, model_definition, param_shapes
from drl_jax.models.towers import TextFeatures
from drl_jax.weights.load import config_of_weights, params_from_state
from drl_jax.weights.weights_file import Weights, read_weights, save_weights

TOWERS = Path(os.environ.get("DRL_TOWERS") or Path(__file__).parents[2] / "shared" / "towers")
NAMES = sorted(path.parent.name for path in TOWERS.glob("*/io.npz"))
# Largest difference of two features of norm about 1 to 10.
TOLERANCE = 2e-5

pytestmark = pytest.mark.skipif(not NAMES, reason="no goldens of towers (DRL_TOWERS)")


def backbone_shapes(config: ModelConfig) -> dict:
    return {"backbone": param_shapes(config)["backbone"]}


def backbone_of(weights: Weights, **changes) -> nnx.Module:
    """The towers of a file as a module; `changes` are of BackboneConfig."""
    description = dataclasses.replace(weights.description.backbone, **changes)
    config = ModelConfig(backbone=description, interaction="dp", agg_module="none")
    assert not BACKBONES[description.family].config_error(description)
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


def differences(weights: Weights, io: dict, **changes) -> dict[str, float]:
    """Largest difference from the golden, by name."""
    backbone = backbone_of(weights, **changes)
    ids = io["text_ids"].astype(np.int32)
    mask = mask_of(ids, weights.description.backbone.family)
    text: TextFeatures = backbone.encode_text(jnp.asarray(ids), jnp.asarray(mask))
    found = {
        "image_features": encode_pixels(backbone, io["pixels"]),
        "text_tokens": text.tokens,
        "text_features": text.sentence,
    }
    return {name: float(np.abs(np.asarray(f) - io[name]).max()) for name, f in found.items()}


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    folder = TOWERS / request.param
    with np.load(folder / "io.npz") as io:
        return read_weights(folder / "weights.safetensors"), dict(io), folder


def test_parity(golden):
    weights, io, _ = golden
    assert max(differences(weights, io).values()) < TOLERANCE


def test_captions_have_the_publishers_length(golden):
    """Of 77 tokens of CLIP, a golden caption has up to 70."""
    weights, io, _ = golden
    assert config_of_weights(weights).data.max_words == io["text_ids"].shape[1]


def test_another_activation_is_another_result(golden):
    weights, io, _ = golden
    for activation in ACTIVATIONS:
        if activation != weights.description.backbone.activation:
            wrong = differences(weights, io, activation=activation)
            # gelu and gelu_tanh differ by 1e-4 at most.
            assert min(wrong.values()) > 2 * TOLERANCE, activation


def test_a_transposed_projection_is_another_result(golden):
    weights, io, _ = golden
    name = "text_projection" + (
        ".weight" if weights.description.backbone.family == "siglip" else ""
    )
    projection = weights.state[f"clip.{name}"]
    if projection.shape[0] != projection.shape[1]:
        pytest.skip("the projection is not square")
    state = weights.state | {f"clip.{name}": projection.T}
    wrong = differences(weights._replace(state=state), io)
    assert wrong["text_features"] > 1e-2
    assert wrong["image_features"] < TOLERANCE


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


def test_a_wrong_epsilon_or_number_of_heads_is_another_result(golden):
    weights, io, _ = golden
    backbone = weights.description.backbone
    eps = 1e-5 if backbone.layer_norm_eps == 1e-6 else 1e-2
    # Too large for the number of digits where the right one is 1e-6: what is normalised is large.
    if backbone.layer_norm_eps == 1e-5:
        assert max(differences(weights, io, layer_norm_eps=eps).values()) > TOLERANCE
    for tower, name in (("vision", "image_features"), ("text", "text_features")):
        heads = f"{tower}_heads"
        wrong = differences(weights, io, **{heads: 2 * getattr(backbone, heads)})
        assert wrong[name] > 1e-3
