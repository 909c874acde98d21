"""The Python API as a user calls it."""

import dataclasses
import inspect
import pkgutil
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from support.commands import ROOT
from support.golden import GOLDEN
from support.params import openai_shaped_backbone, random_params
from support.runs import make_run

import drl_jax
from drl_jax.config import Config, ModelConfig
from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.evaluation.evaluator import Evaluator
from drl_jax.models.drl import model_definition
from drl_jax.models.reference_names import state_dict_from_params
from drl_jax.models.tokenizers import CLIPTokenizer
from drl_jax.pretrained.model import load_source


def test_the_documented_lines_run_in_a_process_of_their_own(search_run, test_videos):
    """Without flags, as in a notebook, and where TensorFlow cannot be imported."""
    code = f"""
import sys
for name in ("tensorflow", "tensorflow_datasets", "clu", "tensorboard"):
    sys.modules[name] = None  # To import it is an error.
import drl_jax
model = drl_jax.load({str(search_run)!r})
text = model.encode_text(["a red circle moves left"])
video = model.encode_videos([{str(min(test_videos.iterdir()))!r}])
cosines = model.pool_text(text) @ model.pool_videos(video).T
print(model.similarity(text, video).shape, cosines.shape)
from absl import flags
assert not flags.FLAGS.is_parsed()
"""
    command = [sys.executable, "-c", code, "--flag_of_a_notebook"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    assert finished.stdout == "(1, 1) (1, 1)\n"


def test_similarities_are_those_of_evaluation(shapes_config, test_videos, tmp_path):
    """Of dp, whose vectors also give them."""
    config = make_run(tmp_path / "run", shapes_config, "dp")
    model = drl_jax.load(tmp_path / "run")
    dataset = VideoDataset(dataset_dir(config))
    split = load_split(dataset, "test", config.data)
    expected = Evaluator(config, dataset, model.layout).run(model.params, split).sim_matrix[:, :5]
    files = [test_videos / f"{dataset.video_ids[video]}.mp4" for video in split.videos[:5]]
    text, video = model.encode_text(split.caption_pairs()[1]), model.encode_videos(files)
    np.testing.assert_allclose(model.similarity(text, video), expected, atol=2e-5)
    pooled = model.pool_text(text) @ model.pool_videos(video).T
    np.testing.assert_allclose(pooled, expected, atol=2e-5)
    # Frames instead of files, and parts of a result.
    frames = [model.read_video(file).frames for file in files[:2]]
    one = {name: array[1:2] for name, array in model.encode_videos(frames).items()}
    np.testing.assert_allclose(model.similarity(text, one), expected[:, 1:2], atol=2e-5)


@pytest.fixture(scope="module")
def openai_shaped():
    """Random parameters of a complete DRL model with such a backbone."""
    backbone = openai_shaped_backbone(32)
    return random_params(ModelConfig(backbone=backbone, temporal_layers=1))


FRAMES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
# More than 32 tokens, and fewer than 77.
LONG = "a man in a red coat walks slowly along the river " * 4


def test_towers_alone_are_zero_shot_retrieval_and_read_all_words(openai_shaped, tmp_path):
    state = state_dict_from_params({"backbone": openai_shaped["backbone"]})
    state = {name.removeprefix("clip."): tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "clip.safetensors")
    model = drl_jax.load(tmp_path / "clip.safetensors", release="openai")
    assert (model.config.model.interaction, model.config.model.agg_module) == ("dp", "none")
    assert (model.config.data.max_words, model.config.data.max_frames) == (77, 12)
    captions = ["a dog", LONG, "dog " * 75, "dog " * 76]
    with pytest.warns(
        UserWarning, match="^1 of 4 captions cut to data.max_words=77 tokens"
    ) as said:
        text = model.encode_text(captions)
    assert (len(said), said[0].filename) == (1, __file__)
    # As OpenAI's code: all positions at once, and the feature of the end token.
    ids = CLIPTokenizer().tokenize(captions, 77).text_ids
    assert (ids == 49407).argmax(1).tolist() == [3, 45, 76, 76]
    backbone = nnx.merge(model_definition(model.config.model), model.params).backbone
    tokens = np.asarray(backbone.encode_text(ids, np.ones(ids.shape, bool)).tokens)
    ends = tokens[np.arange(4), (ids == 49407).argmax(1)]
    expected = ends / np.linalg.norm(ends, axis=1, keepdims=True)
    np.testing.assert_allclose(text["sentence_unit"], expected, atol=1e-6)
    # Alone, it is encoded with fewer positions, and the rest is padding.
    alone = model.encode_text(captions[:1])
    assert alone["text_feat"].shape == (1, 77, 64)
    assert alone["text_mask"].sum() == 4
    assert not alone["text_feat"][0, 32:].any()
    np.testing.assert_allclose(alone["sentence_unit"], expected[:1], atol=1e-6)

    video = model.encode_videos([FRAMES, FRAMES[:1]])
    cosines = text["sentence_unit"] @ video["video_unit"].T
    np.testing.assert_allclose(model.similarity(text, video), cosines, atol=1e-6)


def test_a_drl_checkpoint_loads_with_its_heads_and_another_length(
    openai_shaped, search_run, tmp_path
):
    file = tmp_path / "drl.safetensors"
    save_file(state_dict_from_params(openai_shaped), file)
    model = drl_jax.load(file)
    assert (model.config.model.interaction, model.config.model.agg_module) == ("wti", "seqTransf")
    assert model.config.data.max_words == 32
    jax.tree.map(np.testing.assert_array_equal, model.params, openai_shaped)
    model = drl_jax.load(file, max_words=64)
    assert model.source == {"weights": str(file), "max_words": "64"}
    # The padding of ti and wti takes part in maxima: its place changes no similarity.
    video, scores = model.encode_videos([FRAMES]), []
    for caption in ("a dog", LONG):
        tokens = model.tokenize([caption])
        whole = nnx.merge(model_definition(model.config.model), model.params)
        feat = whole.backbone.encode_text(tokens.text_ids, tokens.text_mask)
        text = whole.interaction.encode_text(feat, tokens.text_mask)
        expected = model.similarity(text, video)
        scores.append(model.similarity(model.encode_text([caption]), video))
        np.testing.assert_allclose(scores[-1], expected, atol=1e-6)
    assert abs(scores[0] - scores[1]) > 1e-4
    run = drl_jax.load(search_run, max_words=40)
    assert load_source(run.source).config.data.max_words == 40
    for wrong in (2, 78, 40.5, "40"):
        with pytest.raises(drl_jax.UserError, match="max_words"):
            drl_jax.load(search_run, max_words=wrong)


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(drl_jax.UserError, match="is too small for the tokenizer of clip"):
        drl_jax.load(GOLDEN / "drl_wti_seqtransf.bin")


def test_mistakes_say_what_to_do(search_model):
    encode_text, encode_videos = search_model.encode_text, search_model.encode_videos
    for call, argument, message in (
        (drl_jax.load, "none.pt", "no run in none.pt: there is no such directory, nor a file"),
        (encode_text, [], "there is no caption"),
        (encode_text, ["a", " "], "text 1 is blank"),
        (encode_text, "a dog", "a list of captions, not one str"),
        (encode_text, ["a", float("nan")], "a caption is a string, not float"),
        (encode_videos, [], "there is no video"),
        (encode_videos, "a.mp4", "encode_videos takes a list of videos, not one str"),
        (encode_videos, ["a.mp4"], r"a\.mp4 cannot be read: No such file"),
    ):
        with pytest.raises(drl_jax.UserError, match=message):
            call(argument)
    with pytest.raises(drl_jax.UserError, match="there is no text_unit; pass the arrays that"):
        search_model.similarity({}, {})
    wrong = {"checkpoint": "3", "tokenizer": 3, "device": [None], "dtype": "x", "max_words": 0}
    for name, value in wrong.items():
        with pytest.raises(drl_jax.UserError, match=f"^(?!config).*{name}"):
            drl_jax.load("shapes_clip", **{name: value})


def test_features_of_another_shape_are_one_line(search_model):
    text = search_model.encode_text(["a dog", "a cat"])
    video = search_model.encode_videos([np.zeros((4, 32, 32, 3), np.uint8)])
    assert search_model.similarity(text, video).shape == (2, 1)
    for name, array in text.items():
        for other in (array[:, :1], array[:1], array[0]):
            with pytest.raises(drl_jax.UserError, match=name):
                search_model.similarity({**text, name: other}, video)
    of_one = {name: array[0] for name, array in text.items()}
    for wrong in (of_one, {**text, "text_weight": text["text_weight"][:1]}, video, None, ["a"]):
        with pytest.raises(drl_jax.UserError, match="encode_text"):
            search_model.pool_text(wrong)


def test_objects_are_short(search_model):
    video = search_model.read_video(np.zeros((2, 32, 32, 3), np.uint8))
    assert repr(video) == f"Video of frames {list(video.frames.shape)} at (0.0, 1.0) s"
    model = drl_jax.load("shapes_clip", dtype="bfloat16")
    assert repr(model).startswith("RetrievalModel of shapes_clip (dtype=bfloat16)\n")


def test_the_fingerprint_depends_on_results_only(search_model):
    def fingerprint(group, **changes):
        part = dataclasses.replace(getattr(search_model.config, group), **changes)
        config = dataclasses.replace(search_model.config, **{group: part})
        return dataclasses.replace(search_model, config=config).fingerprint

    assert fingerprint("data", max_words=5) == search_model.fingerprint
    same = {"similarity_block": 7, "remat": "full", "scan_unroll": 2, "init": "a.pt"}
    assert fingerprint("model", **same) == search_model.fingerprint
    for other in ({"interaction": "ti"}, {"dtype": "bfloat16"}):
        assert fingerprint("model", **other) != search_model.fingerprint


def test_fingerprints_do_not_change():
    backbone = dataclasses.replace(openai_shaped_backbone(32), vocab_size=100)
    config = Config(model=ModelConfig(backbone=backbone, init="a.pt", position_std=0.5))
    params = {"a": np.arange(5, dtype=np.float32)}
    model = drl_jax.RetrievalModel(config, params, None, {}, "", None)
    assert model.fingerprint == "adbee8bd2ad2ec6c9ea7341681a9d721d83a9122453337c9e562c1f782b39306"


def test_the_documented_api_is_the_public_one():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = {module.name for module in pkgutil.iter_modules(drl_jax.__path__)}
    names = set(re.findall(r"\bdrl_jax\.(\w+)", page)) - (modules - set(drl_jax.__all__))
    assert names == set(drl_jax.__all__) == set(dir(drl_jax)) - {"__version__"}
    owners = {"drl_jax": drl_jax, "model": drl_jax.RetrievalModel, "index": drl_jax.Index}
    calls = re.findall(r"`(drl_jax|model|index)\.(\w+)\((.*?)\)`", page)
    assert len(calls) == 14
    for owner, name, arguments in calls:
        assert arguments == arguments_of(getattr(owners[owner], name)), name


def arguments_of(function) -> str:
    """The parameters of a function and their defaults, as the documentation writes them."""
    parameters = inspect.signature(function).parameters.values()
    shown = [p for p in parameters if p.name not in ("self", "show")]
    words = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace("'", '"')
        for p in shown
    ]
    named = [row for row, p in enumerate(shown) if p.kind is p.KEYWORD_ONLY]
    if named:
        words.insert(named[0], "*")
    return ", ".join(words)
