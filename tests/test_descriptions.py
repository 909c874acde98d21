"""What a file of towers is: from its tensors, a description beside it, or a release; or refused."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.golden import GOLDEN
from support.towers import PE, SIGLIP, tiny_state

from drl_jax.config import Config, DataConfig, LossConfig, ModelConfig
from drl_jax.models.drl import BACKBONES, param_shapes
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import sha256
from drl_jax.weights import download
from drl_jax.weights.hugging_face import siglip_to_hugging_face
from drl_jax.weights.json_values import WeightsError
from drl_jax.weights.load import config_of_weights, head_start, initial_params, with_backbone_of
from drl_jax.weights.releases import PUBLISHED, RELEASES
from drl_jax.weights.weights_file import read_weights, save_weights


@pytest.fixture
def clip_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tiny_state(), path)
    return path


# ---------------------------------------------------------------- activation


def test_a_clip_that_does_not_say_its_activation_is_refused(clip_file):
    with pytest.raises(WeightsError) as error:
        read_weights(clip_file)
    message = str(error.value)
    assert f"{clip_file} does not say its activation" in message
    assert "--release=NAME of other commands), one of openai, laion400m_e31" in message
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
    with pytest.raises(WeightsError, match="the release laion is unknown; it is one of openai, "):
        read_weights(clip_file, "laion")


def test_a_release_of_clip_is_not_one_of_siglip(tmp_path):
    save_file(siglip_to_hugging_face(tiny_state(**SIGLIP)), tmp_path / "a.safetensors")
    with pytest.raises(
        WeightsError, match=r"release openai is a CLIP, and .*a\.safetensors is a s"
    ):
        read_weights(tmp_path / "a.safetensors", "openai")


# ---------------------------------------------------------------- families


def test_siglip_needs_no_description(tmp_path):
    path = tmp_path / "siglip.safetensors"
    save_file(siglip_to_hugging_face(tiny_state(**SIGLIP, vocab_size=256_000)), path)
    description = read_weights(path).description
    backbone = description.backbone
    assert (backbone.family, backbone.activation) == ("siglip", "gelu_tanh")
    assert (backbone.layer_norm_eps, backbone.resize) == (1e-6, "squash")
    assert (backbone.vision_mlp_width, backbone.text_mlp_width) == (96, 80)
    assert (backbone.logit_bias, backbone.pad_id, backbone.text_cleaning) == (True, 0, "lower")
    assert "gelu_tanh (guessed from its family), licence: not stated" in str(description)


def test_the_first_siglip_pads_with_its_end_and_drops_punctuation(tmp_path):
    path = tmp_path / "siglip.safetensors"
    save_file(siglip_to_hugging_face(tiny_state(**SIGLIP, vocab_size=32000)), path)
    backbone = read_weights(path).description.backbone
    assert (backbone.pad_id, backbone.text_cleaning) == (1, "canonicalize")


def test_widths_that_are_no_heads_of_64_channels(tmp_path):
    """So400m has 16 heads of 72 channels."""
    path = tmp_path / "siglip.safetensors"
    sizes = {"embed_dim": 1152, "vision_width": 1152, "vision_heads": 16, "vocab_size": 32000}
    save_file(siglip_to_hugging_face(tiny_state(**{**SIGLIP, **sizes})), path)
    assert read_weights(path).description.backbone.vision_heads == 16


def test_unknown_vocabularies_of_siglip_are_not_guessed(tmp_path):
    path = tmp_path / "siglip.safetensors"
    save_file(siglip_to_hugging_face(tiny_state(**SIGLIP)), path)
    with pytest.raises(WeightsError, match=r'has 20 tokens, .* has to say "pad_id"'):
        read_weights(path)
    description = {"family": "siglip", "activation": "gelu_tanh", "pad": 3}
    (tmp_path / "config.json").write_text(json.dumps(description))
    backbone = read_weights(path).description.backbone
    assert (backbone.pad_id, backbone.text_cleaning) == (3, "lower")


@pytest.mark.parametrize(("width", "heads"), [(1280, 16), (1664, 16), (1024, 16), (2048, None)])
def test_heads_of_wide_image_towers(width, heads, tmp_path):
    """H and bigG have heads of 80 and 104 channels."""
    path = tmp_path / "wide.safetensors"
    save_file(tiny_state(vision_width=width, vision_heads=16), path)
    if heads is None:
        with pytest.raises(WeightsError, match=r'2048 channels, .* config.json with "vision_h'):
            read_weights(path, "dfn5b")
    else:
        assert read_weights(path, "dfn5b").description.backbone.vision_heads == heads


# ---------------------------------------------------------------- what is stated, and guesses


@pytest.fixture(params=["clip.", "heads", "archive", "siglip", "pe"])
def suggestive_file(request, tmp_path):
    """Towers of which the form or the names suggest an activation."""
    if request.param == "archive":
        return shutil.copy(GOLDEN / "clip_torchscript.pt", tmp_path / "clip.pt")
    families = {"siglip": {**SIGLIP, "vocab_size": 32_000}, "pe": PE}
    state = {f"clip.{n}": t for n, t in tiny_state(**families.get(request.param, {})).items()}
    if request.param == "heads":
        state["text_weight_fc.weight"] = np.zeros((1, 128), np.float32)
    save_file(state, tmp_path / "towers.safetensors")
    return tmp_path / "towers.safetensors"


def test_a_guess_is_printed_as_one_and_a_description_wins(suggestive_file):
    guess = read_weights(suggestive_file).description
    assert guess.is_guessed
    assert f"{guess.backbone.activation} (guessed from " in str(guess)
    assert "licence: not stated" in str(guess)
    other = "gelu" if guess.backbone.activation != "gelu" else "quick_gelu"
    described = {"family": guess.backbone.family, "activation": other, "mean": [0.1, 0.2, 0.3]}
    suggestive_file.with_name("config.json").write_text(json.dumps({**described, "pad": 1}))
    stated = read_weights(suggestive_file).description
    assert f"activation {other} (from config.json), licence: not stated" in str(stated)
    assert stated.backbone.pixel_mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("suggestive_file", ["clip.", "heads", "archive"], indirect=True)
def test_a_release_wins_over_names_and_form(suggestive_file):
    assert read_weights(suggestive_file).description.backbone.activation == "quick_gelu"
    stated = read_weights(suggestive_file, "laion2b_s34b_b79k").description
    assert "gelu (from the release laion2b_s34b_b79k), licence: MIT" in str(stated)
    described = {"family": "clip", "activation": "quick_gelu"}
    suggestive_file.with_name("config.json").write_text(json.dumps(described))
    with pytest.raises(
        WeightsError, match=r"laion2b_s34b_b79k does not go with .*config.json: act"
    ):
        read_weights(suggestive_file, "laion2b_s34b_b79k")


def test_the_sha256_of_openais_archives_is_a_proof(tmp_path, monkeypatch):
    file = shutil.copy(GOLDEN / "clip_torchscript.pt", tmp_path / "any name.pt")
    monkeypatch.setitem(download.MODELS, "ViT-B/32", sha256(file))
    description = read_weights(file).description
    assert "quick_gelu (from OpenAI's archive (by its sha256)), licence: MIT" in str(description)
    assert read_weights(file, "openai").description == description
    with pytest.raises(
        WeightsError, match=r"is OpenAI's archive \(by its sha256\), not of the rel"
    ):
        read_weights(file, "laion2b_s34b_b79k")
    (tmp_path / "config.json").write_text('{"family": "clip", "activation": "gelu"}')
    with pytest.raises(
        WeightsError, match=r"sha256\) does not go with .*config.json: activation is"
    ):
        read_weights(file)


def test_the_path_of_a_file_says_no_licence(tmp_path, monkeypatch):
    """`weights/ViT-B-32.pt` is what configs/msrvtt.py names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    shutil.copy(GOLDEN / "clip_torchscript.pt", PUBLISHED["clip_b32"].source)
    assert read_weights(PUBLISHED["clip_b32"].source).description.licence == ""


def test_what_an_exported_file_says_is_not_contradicted_in_silence(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(tiny_state(), file)
    (tmp_path / "config.json").write_text('{"family": "clip", "activation": "gelu"}')
    weights = read_weights(file)
    config = config_of_weights(weights)
    params = initial_params(config.model, weights, jax.random.key(0))
    save_weights(file, params, config)
    assert read_weights(file).description.activation_from == "the file"
    (tmp_path / "config.json").write_text('{"family": "clip", "activation": "quick_gelu"}')
    with pytest.raises(
        WeightsError, match=r"config.json contradicts what a.safetensors says of its"
    ):
        read_weights(file)
    # A description of other weights in the same folder.
    (tmp_path / "config.json").write_text(
        '{"family": "clip", "activation": "gelu_tanh", "patch": 8}'
    )
    assert read_weights(file).description.backbone.activation == "gelu"


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context_length": 77}, 77),
        ({"context_length": 248}, 248),  # Long-CLIP.
        ({**SIGLIP, "vocab_size": 32_000}, 64),
        (PE, 32),
    ],
)
def test_towers_alone_read_as_many_words_as_they_have_positions(changes, words, tmp_path):
    state, family = tiny_state(**changes), changes.get("family", "clip")
    state = siglip_to_hugging_face(state) if family == "siglip" else state
    save_file(state, tmp_path / "a.safetensors")
    described = {"family": family, "activation": "gelu", "pad": 1}
    (tmp_path / "config.json").write_text(json.dumps(described))
    data = config_of_weights(read_weights(tmp_path / "a.safetensors")).data
    assert (data.max_words, data.max_frames) == (words, 12)


@pytest.mark.parametrize(("positions", "words"), [(77, 32), (248, 32), (16, 16)])
@pytest.mark.parametrize("head", ["text_weight_fc.weight", "frame_position_embeddings.weight"])
def test_with_heads_they_read_as_many_as_the_original_of_drl(head, positions, words, tmp_path):
    """The second head is CLIP4Clip's, too."""
    state = {f"clip.{name}": t for name, t in tiny_state(context_length=positions).items()}
    save_file({**state, head: np.zeros((1, 128), np.float32)}, tmp_path / "a.safetensors")
    weights = read_weights(tmp_path / "a.safetensors")
    assert weights.has_heads
    assert config_of_weights(weights).data.max_words == words


def test_a_release_of_a_file_that_says_what_it_is_is_refused():
    with pytest.raises(WeightsError, match="says what it is; leave the release out"):
        read_weights("shapes_clip", "openai")


def test_values_that_are_not_finite_are_refused(tmp_path):
    state = tiny_state()
    state["ln_final.weight"][3] = np.nan
    save_file(state, tmp_path / "a.safetensors")
    weights = read_weights(tmp_path / "a.safetensors", "openai")
    config = config_of_weights(weights)
    with pytest.raises(WeightsError, match=r"clip\.ln_final\.weight has values that are not"):
        initial_params(config.model, weights, jax.random.key(0))


def test_perception_encoder_needs_no_description(tmp_path):
    save_file(tiny_state(**PE), tmp_path / "pe.safetensors")
    description = read_weights(tmp_path / "pe.safetensors").description
    backbone = description.backbone
    assert (backbone.family, backbone.activation, backbone.interpolation) == (
        "pe",
        "gelu",
        "bilinear",
    )
    assert "gelu (guessed from its family), licence: not stated" in str(description)


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
