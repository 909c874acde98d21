"""The towers of each family against their publishers' code (`DRL_TOWERS`)."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from support.params import assert_same_arrays

from drl_jax.models.drl import BACKBONES, model_definition, param_shapes
from drl_jax.runs.weights_writer import save_weights
from drl_jax.weights.load import config_of_weights, params_from_state
from drl_jax.weights.weights_file import read_weights

# Those of DRL_TOWERS, and small ones that `golden/make_towers.py` wrote.
TOWERS = Path(os.environ.get("DRL_TOWERS") or Path(__file__).parents[2] / "shared" / "towers")
FOLDERS = sorted(
    path.parent
    for root in (TOWERS, Path(__file__).parent / "golden" / "towers")
    for path in root.glob("*/io.npz")
)
# Of features of norm about 1 to 10; gelu and gelu_tanh differ by up to 1e-4.
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def golden(request):
    """The folder of a file of weights, its configuration, and its parameters."""
    folder = request.param
    weights = read_weights(folder)
    config = config_of_weights(weights)
    shapes = {"backbone": param_shapes(config.model)["backbone"]}
    return folder, config, params_from_state(weights.state, shapes)


def patches_of(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Normalised pixels [N, 3, H, W] -> [N, patches, p*p, 3]; a convolution leaves the rest out."""
    count, _, height, width = (*pixels.shape[:2], *(side // patch for side in pixels.shape[2:]))
    x = pixels.transpose(0, 2, 3, 1)[:, : height * patch, : width * patch]
    x = x.reshape(count, height, patch, width, patch, 3)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, -1, patch * patch, 3)


def test_parity(golden):
    folder, config, params = golden
    assert not BACKBONES[config.model.backbone.family].config_error(config.model.backbone)
    definition = model_definition(config.model)

    @jax.jit
    def compute(params, ids, mask, patches):
        backbone = nnx.merge(definition, params | {"interaction": {}}).backbone
        text, visual = backbone.encode_text(ids, mask), backbone.visual
        return {
            "image_features": visual.pool(visual.embed_pixels(patches)),
            "text_tokens": text.tokens,
            "text_features": text.sentence,
        }

    with np.load(folder / "io.npz") as io:
        expected = dict(io)
    ids = expected["text_ids"].astype(np.int32)
    # SigLIP pools the last position; CLIP and PE that of the highest id (EOS).
    mask = np.arange(ids.shape[1]) <= ids.argmax(1)[:, None]
    if config.model.backbone.family == "siglip":
        mask[:] = True
    patches = patches_of(expected["pixels"], config.model.backbone.vision_patch_size)
    for name, features in compute(params, ids, mask, patches).items():
        np.testing.assert_allclose(features, expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
    # Of 77 tokens of CLIP, a golden caption has up to 70.
    assert config.data.max_words == ids.shape[1]


@pytest.mark.parametrize(
    "golden",
    [folder for folder in FOLDERS if (folder / "weights.safetensors").exists()],
    indirect=True,
    ids=lambda folder: folder.name,
)
def test_export_has_the_publishers_names_and_bits(golden, tmp_path):
    folder, config, params = golden
    exported = tmp_path / "towers.safetensors"
    save_weights(exported, params, config, dtype="float16", clip_only=True)
    assert_same_arrays(load_file(exported), load_file(folder / "weights.safetensors"))
