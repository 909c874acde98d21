"""A run of each family of towers: trained from random weights, tested, exported and searched."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import TINY
from support.tokenizer_files import write_gemma

import drl_jax
from drl_jax.convert import main as convert
from drl_jax.evaluate import main as evaluate
from drl_jax.search.__main__ import main as search
from drl_jax.train import main as train
from drl_jax.weights.weights_file import read_weights

# The stored frames of the tests are cropped, with bicubic interpolation.
STORED = ("resize=crop", "interpolation=bicubic")
FAMILIES = {
    # Features wider than the text tower: the temporal head is new.
    "clip": ("activation=gelu", "embed_dim=64"),
    "siglip": (
        *("activation=gelu_tanh", "layer_norm_eps=1e-6", "logit_bias=True"),
        *("vocab_size=400", "text_cleaning=lower", "context_length=40"),
        *("vision_mlp_width=48", "text_mlp_width=40"),
    ),
    "pe": ("activation=gelu", "context_length=32"),
}

pytestmark = pytest.mark.slow


def flags_of(family: str, folder) -> list[str]:
    fields = (f"family={family}", *STORED, *FAMILIES[family])
    flags = [f"--config.model.backbone.{field}" for field in fields]
    if family == "siglip":
        tokenizer = write_gemma(folder / "tokenizer.json")
        flags += [f"--config.model.tokenizer={tokenizer}", "--config.loss.contrastive=sigmoid"]
    if family == "pe":
        # The pooling of Perception Encoder has 8 heads, and a rotation needs 4 channels a head.
        flags += ["--config.model.backbone.vision_width=32"]
    return flags


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, shapes_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    arguments = (
        "--config=configs/shapes.py:smoke",
        *TINY,
        f"--config.data.data_dir={shapes_data}",
        "--config.data.build_if_absent=False",
        "--config.train.epochs=1",
        f"--workdir={folder / 'run'}",
        *flags_of(request.param, folder),
    )
    assert train(list(arguments)) == 0
    return request.param, folder


def test_a_run_is_trained_and_tested(trained, capsys):
    family, folder = trained
    losses = [
        entry["train/loss"]
        for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
        if "train/loss" in (entry := json.loads(line))
    ]
    assert losses
    assert np.isfinite(losses).all()
    capsys.readouterr()
    assert evaluate([f"--workdir={folder / 'run'}"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((folder / "run" / "result.json").read_text())
    assert f"{result['test']['t2v']['R@1']:.1f}" in printed
    assert drl_jax.load(folder / "run").config.model.backbone.family == family


def test_an_exported_run_is_the_same_model(trained, tmp_path):
    _, folder = trained
    file, again = tmp_path / "a" / "drl.safetensors", tmp_path / "b" / "drl.safetensors"
    assert convert([str(folder / "run"), str(file)]) == 0
    assert convert([str(file), str(tmp_path / "run")]) == 0
    assert convert([str(tmp_path / "run"), str(again)]) == 0
    first, second = load_file(file), load_file(again)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(second[name], tensor, err_msg=name)
    model, original = drl_jax.load(file), drl_jax.load(folder / "run")
    assert model.fingerprint == original.fingerprint


@pytest.fixture
def towers_file(trained, tmp_path):
    """The towers as a publisher has them: without our metadata, with a description beside them."""
    family, folder = trained
    exported = tmp_path / "towers.safetensors"
    assert convert([str(folder / "run"), str(exported), "--clip_only"]) == 0
    backbone = read_weights(exported).description.backbone
    save_file(load_file(exported), exported)
    names = ("activation", "layer_norm_eps", "vision_heads", "text_heads", "text_cleaning")
    names += ("resize", "interpolation", "pad_id", "pixel_mean", "pixel_std")
    description = {"family": family, **{name: getattr(backbone, name) for name in names}}
    (tmp_path / "config.json").write_text(json.dumps(description))
    found = read_weights(exported)
    assert found.config is None
    assert found.description.backbone == backbone
    assert bool(found.tokenizer) == (family == "siglip")
    return exported


def test_towers_alone_search_and_come_back_bit_for_bit(
    trained, towers_file, test_videos, tmp_path, capsys
):
    family, _ = trained
    videos = tmp_path / "videos"
    videos.mkdir()
    for video in sorted(test_videos.glob("*.mp4"))[:5]:
        shutil.copy(video, videos)
    index = [f"--index={tmp_path / 'index'}"]
    arguments = [f"--weights={towers_file}", f"--videos={videos}"]
    assert search(["index", *index, *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"{towers_file}: {family}, patches of " in printed
    assert "(from config.json), licence: " in printed
    assert "5 added" in printed
    # Without --weights, the model is the one that the index names.
    assert search(["query", *index, "a red circle moves left", "--top=2"]) == 0
    assert capsys.readouterr().out.count(".mp4") == 2
    run, again = tmp_path / "run", tmp_path / "again" / "towers.safetensors"
    assert convert([str(towers_file), str(run)]) == 0
    assert convert([str(run), str(again), "--clip_only"]) == 0
    original, found = load_file(towers_file), load_file(again)
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_publishers_names(towers_file, trained):
    name = {
        "clip": "visual.proj",
        "siglip": "vision_model.head.attention.in_proj_weight",
        "pe": "visual.attn_pool.attn.in_proj_weight",
    }[trained[0]]
    assert name in load_file(towers_file)
