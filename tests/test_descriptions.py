"""What a file of towers is: from its tensors, a description beside it, or a release; or refused."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from drl_jax.config import BackboneConfig, Config, DataConfig, LossConfig, ModelConfig
from drl_jax.models.drl import BACKBONES, param_shapes
from drl_jax.runtime.errors import UserError
from drl_jax.weights.description import WeightsError
from drl_jax.weights.hugging_face import to_hugging_face
from drl_jax.weights.load import head_start, initial_params, with_backbone_of
from drl_jax.weights.releases import PUBLISHED, RELEASES
from drl_jax.weights.weights_file import read_weights, state_dict_from_params

TINY = BackboneConfig(
    embed_dim=128,
    image_resolution=32,
    vision_layers=1,
    vision_width=64,
    vision_heads=1,
    vision_patch_size=16,
    vocab_size=20,
    context_length=16,
    text_width=64,
    text_heads=1,
    text_layers=1,
)


def tiny_state(**changes) -> dict[str, np.ndarray]:
    """Random towers under OpenAI's names; `changes` are of BackboneConfig."""
    backbone = dataclasses.replace(TINY, **changes)
    assert not BACKBONES[backbone.family].config_error(backbone)
    config = ModelConfig(backbone=backbone, interaction="dp", agg_module="none")
    shapes = {"backbone": param_shapes(config)["backbone"]}
    rng = np.random.default_rng(0)

    def draw(tree):
        if isinstance(tree, dict):
            return {name: draw(child) for name, child in tree.items()}
        return np.asarray(0.1 * rng.normal(size=tree.shape), np.float32)

    state = state_dict_from_params(draw(shapes))
    return {name.removeprefix("clip."): tensor for name, tensor in state.items()}


SIGLIP = {
    "family": "siglip",
    "embed_dim": 64,
    "context_length": 64,
    "logit_bias": True,
    "vision_mlp_width": 96,
    "text_mlp_width": 80,
}
PE = {"family": "pe", "context_length": 32}


@pytest.fixture
def clip_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tiny_state(), path)
    return path


def write(path, name, values):
    path.with_name(name).write_text(json.dumps(values))


# ---------------------------------------------------------------- activation


def test_a_clip_that_does_not_say_its_activation_is_refused(clip_file):
    with pytest.raises(WeightsError) as error:
        read_weights(clip_file)
    message = str(error.value)
    assert f"{clip_file} does not say its activation" in message
    assert "--config.model.release=NAME, one of openai, laion400m_e31" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("release", "activation", "licence"),
    [
        ("openai", "quick_gelu", "MIT"),
        ("laion2b_s34b_b79k", "gelu", "MIT"),
        ("metaclip_400m", "quick_gelu", "CC-BY-NC-4.0"),
        ("laion400m_e32", "gelu", "MIT"),  # quick_gelu with patches of 32 pixels only.
    ],
)
def test_a_release_says_it(clip_file, release, activation, licence):
    description = read_weights(clip_file, release).description
    assert description.backbone.activation == activation
    assert f"(from the release {release}), licence: {licence}" in str(description)


def test_the_activation_of_laion_400m_depends_on_the_patches(tmp_path):
    save_file(tiny_state(vision_patch_size=32), tmp_path / "a.safetensors")
    found = read_weights(tmp_path / "a.safetensors", "laion400m_e31").description
    assert found.backbone.activation == "quick_gelu"


def test_an_unknown_release_is_refused(clip_file):
    with pytest.raises(WeightsError, match="release=laion is unknown; it is one of openai, "):
        read_weights(clip_file, "laion")


def test_a_release_of_clip_is_not_one_of_siglip(tmp_path):
    save_file(to_hugging_face(tiny_state(**SIGLIP), "siglip"), tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"release=openai is a CLIP; .*a\.safetensors is a sig"):
        read_weights(tmp_path / "a.safetensors", "openai")


# ---------------------------------------------------------------- files beside the weights


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 20,
            "width": 64,
            "heads": 4,
            "layers": 1,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}


def test_open_clip_config(clip_file):
    write(clip_file, "open_clip_config.json", OPEN_CLIP)
    description = read_weights(clip_file).description
    backbone = description.backbone
    assert (backbone.activation, description.activation_from) == ("gelu", "open_clip_config.json")
    assert (backbone.pixel_mean, backbone.pixel_std) == ((0.5,) * 3, (0.25,) * 3)
    assert (backbone.resize, backbone.interpolation) == ("squash", "bilinear")
    assert (backbone.vision_heads, backbone.text_heads) == (1, 4)
    quick = {**OPEN_CLIP, "model_cfg": {**OPEN_CLIP["model_cfg"], "quick_gelu": True}}
    write(clip_file, "open_clip_config.json", quick)
    assert read_weights(clip_file).description.backbone.activation == "quick_gelu"


def test_hugging_face_config(tmp_path):
    path = tmp_path / "model.safetensors"
    state = to_hugging_face(tiny_state(), "clip")
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in state.items()}, path)
    vision = {"hidden_size": 64, "hidden_act": "gelu", "num_attention_heads": 2}
    text = {"hidden_size": 64, "hidden_act": "gelu", "num_attention_heads": 4}
    config = {"model_type": "clip", "vision_config": vision, "text_config": text}
    write(path, "config.json", config)
    write(
        path,
        "preprocessor_config.json",
        {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "resample": 2, "size": {"height": 32}},
    )
    backbone = read_weights(path).description.backbone
    assert backbone.activation == "gelu"
    assert (backbone.vision_heads, backbone.text_heads) == (2, 4)
    assert (backbone.pixel_mean, backbone.resize) == ((0.0, 0.0, 0.0), "squash")
    # What Hugging Face's file leaves out has the library's default.
    for tower in (vision, text):
        del tower["hidden_act"]
    write(path, "config.json", config)
    assert read_weights(path).description.backbone.activation == "quick_gelu"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", "[", "is damaged: it is not JSON"),
        ("config.json", "[]", "is not a JSON object"),
        ("open_clip_config.json", "{}", "cannot be used: KeyError"),
        (
            "config.json",
            {"model_type": "blip", "vision_config": {}},
            "model_type 'blip' is not supported",
        ),
        (
            "config.json",
            {"model_type": "clip", "vision_config": {"hidden_act": "relu"}, "text_config": {}},
            "hidden_act quick_gelu, relu is unsupported",
        ),
        (
            "config.json",
            {
                "model_type": "clip",
                "vision_config": {"hidden_size": 768, "num_attention_heads": 1},
                "text_config": {},
            },
            "describes other weights than model.safetensors: vision_width is 768 in one and 64",
        ),
        (
            "open_clip_config.json",
            {
                "model_cfg": {
                    **OPEN_CLIP["model_cfg"],
                    "text_cfg": {**OPEN_CLIP["model_cfg"]["text_cfg"], "no_causal_mask": True},
                }
            },
            "no_causal_mask=True is unsupported",
        ),
    ],
)
def test_descriptions_that_cannot_be_used_are_one_line(clip_file, name, values, message):
    text = values if isinstance(values, str) else json.dumps(values)
    clip_file.with_name(name).write_text(text)
    with pytest.raises(WeightsError) as error:
        read_weights(clip_file)
    assert message in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_release_against_a_description(clip_file):
    write(clip_file, "open_clip_config.json", OPEN_CLIP)
    with pytest.raises(WeightsError, match=r"release=openai does not go with .*activation is gelu"):
        read_weights(clip_file, "openai")


def test_the_release_is_enough_beside_the_description_of_another_file(clip_file):
    other = {**OPEN_CLIP, "model_cfg": {**OPEN_CLIP["model_cfg"], "embed_dim": 512}}
    write(clip_file, "open_clip_config.json", other)
    with pytest.raises(WeightsError, match="describes other weights"):
        read_weights(clip_file)
    assert read_weights(clip_file, "openai").description.backbone.activation == "quick_gelu"


# ---------------------------------------------------------------- families


def test_siglip_needs_no_description(tmp_path):
    path = tmp_path / "siglip.safetensors"
    save_file(to_hugging_face(tiny_state(**SIGLIP), "siglip"), path)
    description = read_weights(path).description
    backbone = description.backbone
    assert (backbone.family, backbone.activation) == ("siglip", "gelu_tanh")
    assert (backbone.layer_norm_eps, backbone.resize) == (1e-6, "squash")
    assert (backbone.vision_mlp_width, backbone.text_mlp_width) == (96, 80)
    assert (backbone.logit_bias, backbone.pad_id, backbone.text_cleaning) == (True, 0, "lower")
    assert description.licence == "Apache-2.0"


def test_the_first_siglip_pads_with_its_end_and_drops_punctuation(tmp_path):
    path = tmp_path / "siglip.safetensors"
    save_file(to_hugging_face(tiny_state(**SIGLIP, vocab_size=32000), "siglip"), path)
    backbone = read_weights(path).description.backbone
    assert (backbone.pad_id, backbone.text_cleaning) == (1, "canonicalize")


def test_widths_that_are_no_heads_of_64_channels(tmp_path):
    """So400m has 16 heads of 72 channels."""
    path = tmp_path / "siglip.safetensors"
    sizes = {"embed_dim": 1152, "vision_width": 1152, "vision_heads": 16}
    save_file(to_hugging_face(tiny_state(**{**SIGLIP, **sizes}), "siglip"), path)
    assert read_weights(path).description.backbone.vision_heads == 16


def test_perception_encoder_needs_no_description(tmp_path):
    save_file(tiny_state(**PE), tmp_path / "pe.safetensors")
    description = read_weights(tmp_path / "pe.safetensors").description
    backbone = description.backbone
    assert (backbone.family, backbone.activation, backbone.interpolation) == (
        "pe",
        "gelu",
        "bilinear",
    )
    assert description.licence == "Apache-2.0"


def test_heads_and_bias_start_as_the_announcement_says(tmp_path):
    """Features have 128 channels and the text tower 64: the heads are new."""
    save_file(tiny_state(), tmp_path / "a.safetensors")
    weights = read_weights(tmp_path / "a.safetensors", "laion2b_s34b_b79k")
    loss = LossConfig(contrastive="sigmoid")
    config = Config(
        data=DataConfig(holdout=1, max_words=8, max_frames=4),
        model=ModelConfig(temporal_layers=1),
        loss=loss,
    )
    model = with_backbone_of(config, weights).model
    assert head_start(model, weights) == (
        "temporal head: new, since features have 128 channels and the text tower 64"
    )
    params = initial_params(model, weights, jax.random.key(0))
    assert params["backbone"]["logit_bias"] == -10
    blocks = params["temporal"]["transformer"]["resblocks"]
    assert blocks["attn"]["in_proj"]["kernel"].shape == (1, 128, 384)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_towers_can_be_built(name):
    backbone = PUBLISHED[name].backbone
    assert not BACKBONES[backbone.family].config_error(backbone)
    shapes = param_shapes(ModelConfig(backbone=backbone))
    assert shapes["backbone"]["token_embedding"]["embedding"].shape[0] == backbone.vocab_size


def test_releases_name_known_activations():
    assert {release.activation for release in RELEASES.values()} == {"gelu", "quick_gelu"}


# ---------------------------------------------------------------- refused by name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"video_model.vision_model.a": np.zeros(1)}, "is VideoPrism, a video model"),
        (lambda s: {"vision_encoder.blocks.0.a": np.zeros(1)}, "is InternVideo2"),
        (lambda s: {"visual.trunk.pos_embed": np.zeros(1)}, "open_clip's form of another"),
        (
            lambda s: {**s, "visual.proj.weight_scale": np.zeros(1)},
            "is quantised; get the float weights",
        ),
        (
            lambda s: {**s, "ln_final.weight": np.zeros(64, np.int8)},
            "is quantised: ln_final.weight is int8",
        ),
        (
            lambda s: {**s, "ln_final.weight": np.zeros(64, ml_dtypes.float8_e4m3fn)},
            "is quantised: ln_final.weight is F8_E4M3",
        ),
        (
            lambda s: {"vision_model.embeddings.patch_embedding.weight": np.zeros((4, 12))},
            "is a NaFlex SigLIP 2",
        ),
    ],
)
def test_files_that_are_not_supported_are_refused_by_name(change, message, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(change(tiny_state()), path)
    with pytest.raises(UserError) as error:
        read_weights(path, "openai")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_perception_encoder_without_class_token_is_refused(tmp_path):
    state = tiny_state(**PE)
    del state["visual.class_embedding"]
    save_file(state, tmp_path / "g.safetensors")
    with pytest.raises(WeightsError, match="is a PE-Core G, without a class token; supported are"):
        read_weights(tmp_path / "g.safetensors")


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_sharded_weights_are_refused(name, tmp_path):
    with pytest.raises(WeightsError, match="is one part of sharded weights; join them"):
        read_weights(tmp_path / name)
