"""Descriptions beside files of towers: Hugging Face's, open_clip's and ours."""

import copy
import json

import pytest
from safetensors.numpy import save_file
from support.towers import tiny_state, to_hugging_face

from drl_jax.config import Config, DataConfig, ModelConfig
from drl_jax.runs.run_params import with_backbone_of
from drl_jax.weights.errors import WeightsError
from drl_jax.weights.weights_file import read_weights

OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 20, "width": 64, "heads": 4, "layers": 1},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}
HUGGING_FACE = {
    "model_type": "clip",
    "vision_config": {
        "hidden_size": 64,
        "hidden_act": "gelu",
        "num_attention_heads": 2,
        "image_size": 32,
    },
    "text_config": {"hidden_size": 64, "hidden_act": "gelu", "num_attention_heads": 4},
}
PREPROCESSOR = {
    "image_mean": [0, 0, 0],
    "image_std": [1, 1, 1],
    "resample": 2,
    "size": {"height": 32, "width": 32},
    "do_center_crop": False,
}
OURS = {"family": "clip", "activation": "gelu", "vision_heads": 2}


@pytest.fixture
def clip_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tiny_state(), path)
    return path


@pytest.fixture
def hugging_face_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(to_hugging_face(tiny_state()), path)
    return path


def write(path, name, values):
    path.with_name(name).write_text(json.dumps(values))


def changed(values: dict, dotted: str, value) -> dict:
    """A copy with another value of one field."""
    values = copy.deepcopy(values)
    *groups, name = dotted.split(".")
    group = values
    for part in groups:
        group = group.setdefault(part, {})
    group[name] = value
    return values


def test_open_clip_config(clip_file):
    write(clip_file, "open_clip_config.json", OPEN_CLIP)
    description = read_weights(clip_file).description
    backbone = description.backbone
    assert (backbone.activation, description.source) == ("gelu", "from open_clip_config.json")
    assert (backbone.pixel_mean, backbone.pixel_std) == ((0.5,) * 3, (0.25,) * 3)
    assert (backbone.resize, backbone.interpolation) == ("squash", "bilinear")
    assert (backbone.vision_heads, backbone.text_heads) == (1, 4)
    for field, value, found in (
        ("model_cfg.quick_gelu", True, ("activation", "quick_gelu")),
        ("model_cfg.vision_cfg.head_width", 32, ("vision_heads", 2)),
        ("preprocess_cfg.resize_mode", "shortest", ("resize", "crop")),
    ):
        write(clip_file, "open_clip_config.json", changed(OPEN_CLIP, field, value))
        assert getattr(read_weights(clip_file).description.backbone, found[0]) == found[1]
    eps = OPEN_CLIP
    for tower in ("vision_cfg", "text_cfg"):
        eps = changed(eps, f"model_cfg.{tower}.norm_kwargs.eps", 1e-6)
        eps = changed(eps, f"model_cfg.{tower}.act_kwargs.approximate", "tanh")
    write(clip_file, "open_clip_config.json", eps)
    backbone = read_weights(clip_file).description.backbone
    assert (backbone.layer_norm_eps, backbone.activation) == (1e-6, "gelu_tanh")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_hugging_face_config(hugging_face_file, name):
    path = hugging_face_file
    write(path, "config.json", HUGGING_FACE)
    content = {"image_processor": PREPROCESSOR} if name.startswith("processor") else PREPROCESSOR
    write(path, name, content)
    backbone = read_weights(path).description.backbone
    assert backbone.activation == "gelu"
    assert (backbone.vision_heads, backbone.text_heads) == (2, 4)
    assert (backbone.pixel_mean, backbone.pixel_std) == ((0.0,) * 3, (1.0,) * 3)
    assert (backbone.resize, backbone.interpolation) == ("squash", "bilinear")


def test_what_hugging_faces_file_leaves_out_has_the_librarys_default(hugging_face_file):
    config = copy.deepcopy(HUGGING_FACE)
    for tower in ("vision_config", "text_config"):
        del config[tower]["hidden_act"]
    write(hugging_face_file, "config.json", config)
    backbone = read_weights(hugging_face_file).description.backbone
    assert (backbone.activation, backbone.layer_norm_eps) == ("quick_gelu", 1e-5)


def test_our_own_form(clip_file):
    values = {**OURS, "mean": [0.5, 0.5, 0.5], "resize": "squash", "note": "from a friend"}
    write(clip_file, "config.json", values)
    backbone = read_weights(clip_file).description.backbone
    assert (backbone.vision_heads, backbone.pixel_mean, backbone.resize) == (
        2,
        (0.5,) * 3,
        "squash",
    )
    # Also without a family, which the tensors say.
    write(clip_file, "config.json", {"activation": "gelu", "text_heads": 4})
    description = read_weights(clip_file).description
    assert (description.backbone.activation, description.source) == ("gelu", "from config.json")


def test_the_file_wins_over_the_configuration_where_input_is_prepared(clip_file):
    """A configuration with the sizes of the file, as configs/msrvtt.py has for published towers."""
    write(clip_file, "open_clip_config.json", OPEN_CLIP)
    weights = read_weights(clip_file)
    backbone = weights.description.backbone
    other = {**backbone.__dict__, "interpolation": "bicubic", "pixel_mean": (0.1, 0.1, 0.1)}
    model = ModelConfig(backbone=type(backbone)(**other), temporal_layers=1)
    config = Config(data=DataConfig(holdout=1, max_words=8, max_frames=4), model=model)
    assert with_backbone_of(config, weights).model.backbone == backbone


def towers(dotted: str, value: object) -> tuple[str, dict]:
    return "config.json", changed(HUGGING_FACE, dotted, value)


def open_clip(dotted: str, value: object) -> tuple[str, dict]:
    return "open_clip_config.json", changed(OPEN_CLIP, dotted, value)


REFUSED = (
    (("config.json", "["), "is damaged: it is not JSON"),
    (
        ("config.json", '{"activation": "gelu", "activation": "quick_gelu"}'),
        "has the key 'activation'",
    ),
    (("config.json", "[]"), "is not a JSON object"),
    (
        ("open_clip_config.json", '{"model_cfg": {}}'),
        "model_cfg.embed_dim must be int, not None",
    ),
    (
        towers("model_type", "blip"),
        "model_type is 'blip', not one of clip, metaclip_2, siglip, siglip2",
    ),
    (
        towers("vision_config.hidden_act", "relu"),
        "vision_config.hidden_act is 'relu', not one of quick_gelu, gelu, ",
    ),
    (towers("vision_config.layer_norm_eps", 1e-6), "layer_norm_eps differs between the towers"),
    (
        towers("vision_config.hidden_size", 768),
        "describes other weights: vision_width is 768 in one and 64",
    ),
    (
        open_clip("model_cfg.text_cfg.no_causal_mask", True),
        "text_cfg.no_causal_mask=True is not supported",
    ),
    (open_clip("model_cfg.quick_gelu", "false"), "quick_gelu is 'false', not one of false, true"),
    (
        open_clip("model_cfg.vision_cfg.act_kwargs", {"approximate": "fast"}),
        "vision_cfg.act_kwargs.approximate is 'fast', not one of none, tanh",
    ),
    (
        open_clip("preprocess_cfg.interpolation", "random"),
        "preprocess_cfg.interpolation is bicubic or bilinear, not 'random'",
    ),
    (
        open_clip("preprocess_cfg.mean", [0.5, 0.5]),
        "mean must be a tuple of 3 numbers, not [0.5, 0.5]",
    ),
    (
        open_clip("model_cfg.vision_cfg.timm_model_name", "vit_x"),
        "the tower vit_x is not supported",
    ),
    (("config.json", {**OURS, "vison_heads": 7}), "vison_heads is unknown; did you mean vision_h"),
    (
        ("config.json", {**OURS, "layer_norm_eps": 1e300}),
        "layer_norm_eps must be in (0, 1), not 1e+300",
    ),
    (("config.json", {**OURS, "attn_pooler_heads": 4}), "attn_pooler_heads=4 is not supported"),
)


@pytest.mark.parametrize(("file", "message"), REFUSED)
def test_descriptions_that_cannot_be_used_are_one_line(clip_file, file, message):
    name, values = file
    text = values if isinstance(values, str) else json.dumps(values)
    clip_file.with_name(name).write_text(text)
    with pytest.raises(WeightsError) as error:
        read_weights(clip_file)
    assert message in str(error.value)
    assert str(clip_file.with_name(name)) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", {"height": 48, "width": 48}, "size={'height': 48, 'width': 48} is not supported"),
        ("size", {"shortest_edge": 32}, "size={'shortest_edge': 32} is not supported"),
        ("do_normalize", False, "do_normalize=False is not supported"),
        ("do_resize", False, "do_resize=False is not supported"),
        ("rescale_factor", 1.0, "rescale_factor=1.0 is not supported"),
        ("resample", 0, "resample is 0, not one of 2, 3"),
        ("resample", [3], "resample is [3], not one of 2, 3"),
        ("size", {"height": [32]}, "size={'height': [32]} is not supported"),
        ("image_mean", None, "image_mean must be a tuple of 3 numbers, not None"),
    ],
)
def test_preprocessing_that_we_cannot_do_is_refused(hugging_face_file, field, value, message):
    write(hugging_face_file, "config.json", HUGGING_FACE)
    write(hugging_face_file, "preprocessor_config.json", changed(PREPROCESSOR, field, value))
    with pytest.raises(WeightsError) as error:
        read_weights(hugging_face_file)
    assert f"preprocessor_config.json: {message}" in str(error.value)


def test_two_descriptions_with_two_activations(clip_file):
    write(clip_file, "open_clip_config.json", OPEN_CLIP)
    write(clip_file, "config.json", OURS)
    assert read_weights(clip_file).description.source == "from open_clip_config.json"
    write(clip_file, "config.json", {**OURS, "activation": "quick_gelu"})
    with pytest.raises(
        WeightsError, match=r"open_clip_config.json gelu and config.json quick_gelu; move one"
    ):
        read_weights(clip_file)


def test_a_release_goes_with_the_description_of_another_file_only(clip_file):
    write(clip_file, "open_clip_config.json", OPEN_CLIP)
    with pytest.raises(WeightsError, match=r"release openai does not go with .*activation is gelu"):
        read_weights(clip_file, "openai")
    write(clip_file, "open_clip_config.json", changed(OPEN_CLIP, "model_cfg.embed_dim", 512))
    with pytest.raises(WeightsError, match="describes other weights"):
        read_weights(clip_file)
    assert read_weights(clip_file, "openai").description.backbone.activation == "quick_gelu"
