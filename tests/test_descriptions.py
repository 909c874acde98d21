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
from drl_jax.hub import openai
from drl_jax.hub.releases import PUBLISHED, RELEASES
from drl_jax.models.drl import BACKBONES, param_shapes
from drl_jax.models.reference_names import SIGLIP_HF, to_publisher
from drl_jax.runs.run_params import head_start, with_backbone_of
from drl_jax.runs.weights_writer import save_weights
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import sha256
from drl_jax.weights import description
from drl_jax.weights.errors import WeightsError
from drl_jax.weights.load import config_of_weights, initial_params
from drl_jax.weights.weights_file import read_weights

NORM = "ln_final.weight"


@pytest.fixture
def loaded(tmp_path):
    """Returns `loaded(state, release="", config=None)`, which writes a file of towers, beside a
    `config.json` unless it is None, and reads it."""

    def read(state, release="", config=None):
        path = tmp_path / "a.safetensors"
        save_file(state, path)
        path.with_name("config.json").unlink(missing_ok=True)
        if config is not None:
            path.with_name("config.json").write_text(json.dumps(config))
        return read_weights(path, release)

    return read


@pytest.fixture
def described(loaded):
    """The same, of which it returns the description."""
    return lambda *arguments, **options: loaded(*arguments, **options).description


def siglip(**changes):
    """SigLIP's towers under Hugging Face's names."""
    return to_publisher(tiny_state(**{**SIGLIP, **changes}), SIGLIP_HF)


# ---------------------------------------------------------------- activation


def test_a_clip_that_does_not_say_its_activation_is_refused(described, tmp_path):
    with pytest.raises(WeightsError) as error:
        described(tiny_state())
    message = str(error.value)
    assert f"{tmp_path / 'a.safetensors'} does not say its activation" in message
    assert "or release=NAME), one of openai, laion400m_e31" in message
    assert "\n" not in message
    with pytest.raises(WeightsError, match="the release laion is unknown; it is one of openai, "):
        described(tiny_state(), "laion")
    with pytest.raises(
        WeightsError, match=r"a\.safetensors is a siglip, and the release openai is a C"
    ):
        described(siglip(), "openai")


def test_a_release_says_it(described):
    assert {release.activation for release in RELEASES.values()} == {"gelu", "quick_gelu"}
    for release, patch, activation, licence in (
        ("openai", 16, "quick_gelu", "MIT"),
        ("laion2b_s34b_b79k", 16, "gelu", "MIT"),
        ("metaclip_400m", 16, "quick_gelu", "CC-BY-NC-4.0"),
        # That of LAION-400M depends on the patches.
        ("laion400m_e32", 16, "gelu", "MIT"),
        ("laion400m_e31", 32, "quick_gelu", "MIT"),
    ):
        description = described(tiny_state(vision_patch_size=patch), release)
        assert description.backbone.activation == activation
        assert f"(from the release {release}), licence: {licence}" in str(description)


# ---------------------------------------------------------------- families


def test_siglip_needs_no_description(described):
    description = described(siglip(vocab_size=256_000))
    backbone = description.backbone
    assert (backbone.family, backbone.activation) == ("siglip", "gelu_tanh")
    assert (backbone.layer_norm_eps, backbone.resize) == (1e-6, "squash")
    assert (backbone.vision_mlp_width, backbone.text_mlp_width) == (96, 80)
    assert (backbone.logit_bias, backbone.pad_id, backbone.text_cleaning) == (True, 0, "lower")
    assert "gelu_tanh (guessed from its family), licence: not stated" in str(description)
    # The first one pads with its end and drops punctuation. So400m has 16 heads of 72 channels.
    backbone = described(
        siglip(embed_dim=1152, vision_width=1152, vision_heads=16, vocab_size=32000)
    ).backbone
    assert (backbone.pad_id, backbone.text_cleaning) == (1, "canonicalize")
    assert backbone.vision_heads == 16
    # Other vocabularies are not guessed.
    with pytest.raises(WeightsError, match=r'has 20 tokens, .* has to say "pad_id"'):
        described(siglip())
    config = {"family": "siglip", "activation": "gelu_tanh", "pad": 3}
    backbone = described(siglip(), config=config).backbone
    assert (backbone.pad_id, backbone.text_cleaning) == (3, "lower")


def test_perception_encoder_needs_no_description(described):
    description = described(tiny_state(**PE))
    backbone = description.backbone
    found = (backbone.family, backbone.activation, backbone.interpolation)
    assert found == ("pe", "gelu", "bilinear")
    assert "gelu (guessed from its family), licence: not stated" in str(description)


def test_heads_of_wide_image_towers(described, monkeypatch):
    """H and bigG have heads of 80 and 104 channels."""
    state = tiny_state(vision_width=1664, vision_heads=16)
    assert described(state, "dfn5b").backbone.vision_heads == 16
    monkeypatch.setattr(description, "_MAX_WIDTH", 640)
    for width in (624, 704):  # No heads of 64 channels; wider than any known tower.
        with pytest.raises(WeightsError, match=rf'{width} channels, .* config.json with "vision_h'):
            described(tiny_state(vision_width=width, vision_heads=16), "dfn5b")


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
    assert f"{guess.backbone.activation} (guessed from " in str(guess)
    assert "licence: not stated" in str(guess)
    other = "gelu" if guess.backbone.activation != "gelu" else "quick_gelu"
    config = {"family": guess.backbone.family, "activation": other, "mean": [0.1, 0.2, 0.3]}
    suggestive_file.with_name("config.json").write_text(json.dumps({**config, "pad": 1}))
    stated = read_weights(suggestive_file).description
    assert f"activation {other} (from config.json), licence: not stated" in str(stated)
    assert stated.backbone.pixel_mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("suggestive_file", ["clip.", "heads", "archive"], indirect=True)
def test_a_release_wins_over_names_and_form(suggestive_file):
    assert read_weights(suggestive_file).description.backbone.activation == "quick_gelu"
    stated = read_weights(suggestive_file, "laion2b_s34b_b79k").description
    assert "gelu (from the release laion2b_s34b_b79k), licence: MIT" in str(stated)
    config = {"family": "clip", "activation": "quick_gelu"}
    suggestive_file.with_name("config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"laion2b_s34b_b79k does not go with .*config"):
        read_weights(suggestive_file, "laion2b_s34b_b79k")


def test_the_sha256_of_openais_archives_is_a_proof(tmp_path, monkeypatch):
    file = shutil.copy(GOLDEN / "clip_torchscript.pt", tmp_path / "any name.pt")
    monkeypatch.setitem(openai.MODELS, "ViT-B/32", sha256(file))
    description = read_weights(file).description
    assert "quick_gelu (from OpenAI's archive (by its sha256)), licence: MIT" in str(description)
    assert read_weights(file, "openai").description == description
    with pytest.raises(WeightsError, match=r"is OpenAI's archive \(by its sha256\), not of the"):
        read_weights(file, "laion2b_s34b_b79k")
    (tmp_path / "config.json").write_text('{"family": "clip", "activation": "gelu"}')
    with pytest.raises(WeightsError, match=r"sha256\) does not go with .*config.json: act"):
        read_weights(file)


def test_the_path_of_a_file_says_no_licence(tmp_path, monkeypatch):
    """`weights/ViT-B-32.pt` is what configs/msrvtt.py names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    shutil.copy(GOLDEN / "clip_torchscript.pt", PUBLISHED["clip_b32"].source)
    assert read_weights(PUBLISHED["clip_b32"].source).description.licence == ""


def test_what_an_exported_file_says_is_not_contradicted_in_silence(loaded, tmp_path):
    file = tmp_path / "a.safetensors"
    weights = loaded(tiny_state(), config={"family": "clip", "activation": "gelu"})
    config = config_of_weights(weights)
    params = initial_params(config.model, weights, jax.random.key(0))
    save_weights(file, params, config)
    assert read_weights(file).description.source == "from the file"
    (tmp_path / "config.json").write_text('{"family": "clip", "activation": "quick_gelu"}')
    with pytest.raises(WeightsError, match=r"a.safetensors contradicts .*config.json: act"):
        read_weights(file)
    # A description of other weights in the same folder.
    other = {"family": "clip", "activation": "gelu_tanh", "patch": 8}
    (tmp_path / "config.json").write_text(json.dumps(other))
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
def test_towers_alone_read_as_many_words_as_they_have_positions(changes, words, loaded):
    state, family = tiny_state(**changes), changes.get("family", "clip")
    state = to_publisher(state, SIGLIP_HF) if family == "siglip" else state
    config = {"family": family, "activation": "gelu", "pad": 1}
    data = config_of_weights(loaded(state, config=config)).data
    assert (data.max_words, data.max_frames) == (words, 12)


@pytest.mark.parametrize(("positions", "words"), [(77, 32), (248, 32), (16, 16)])
def test_with_heads_they_read_as_many_as_the_original_of_drl(positions, words, loaded):
    state = {f"clip.{name}": t for name, t in tiny_state(context_length=positions).items()}
    # The second head is CLIP4Clip's, too.
    # The third is CLIP4Clip's meanP, which has none.
    for head in ("text_weight_fc.weight", "frame_position_embeddings.weight", ""):
        weights = loaded(state | ({head: np.zeros((1, 128), np.float32)} if head else {}))
        assert weights.has_heads == bool(head)
        assert config_of_weights(weights).data.max_words == words


def test_a_release_of_a_file_that_says_what_it_is_is_refused():
    with pytest.raises(WeightsError, match="says what it is; leave the release out"):
        read_weights("shapes_clip", "openai")


def test_values_that_are_not_finite_are_refused(loaded):
    weights = loaded({**tiny_state(), NORM: np.full(64, np.nan, np.float32)}, "openai")
    config = config_of_weights(weights)
    with pytest.raises(WeightsError, match=r"clip\.ln_final\.weight has values that are not"):
        initial_params(config.model, weights, jax.random.key(0))


def test_heads_and_bias_start_as_the_announcement_says(loaded):
    """Features have 128 channels and the text tower 64: the heads are new."""
    weights = loaded(tiny_state(), "laion2b_s34b_b79k")
    data, loss = DataConfig(holdout=1, max_words=8, max_frames=4), LossConfig("sigmoid")
    config = Config(data=data, model=ModelConfig(temporal_layers=1), loss=loss)
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


# ---------------------------------------------------------------- refused by name


def without_class_token():
    state = tiny_state(**PE)
    del state["visual.class_embedding"]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"video_model.vision_model.a": np.zeros(1)}, "is VideoPrism, a video model"),
        ({"vision_encoder.blocks.0.a": np.zeros(1)}, "is InternVideo2"),
        ({"visual.trunk.pos_embed": np.zeros(1)}, "open_clip's form of another image tower"),
        ({"vision_model.embeddings.patch_embedding.weight": np.zeros((4, 12))},
         "is a NaFlex SigLIP 2"),
        ({**tiny_state(), "visual.proj.weight_scale": np.zeros(1)},
         "is quantised; get the float weights"),
        ({**tiny_state(), NORM: np.zeros(64, np.int8)}, f"is quantised: {NORM} is int8"),
        ({**tiny_state(), NORM: np.zeros(64, ml_dtypes.float8_e4m3fn)},
         f"{NORM} in the form of F8_E4M3: sparse, quantised"),
        (without_class_token(), "is a PE-Core G, without a class token; supported are"),
    ],
)  # fmt: skip
def test_files_that_are_not_supported_are_refused_by_name(state, message, described):
    with pytest.raises(UserError) as error:
        described(state, "openai" if "PE-Core" not in message else "")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
