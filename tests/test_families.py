"""Families other than CLIP: trained from random weights, exported and searched."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import TINY
from support.params import assert_same_arrays
from support.tokenizer_files import write_gemma

import drl_jax
from drl_jax.convert import main as convert
from drl_jax.search.__main__ import main as search
from drl_jax.train import main as train
from drl_jax.weights.weights_file import read_weights

FAMILIES = {
    "siglip": (
        *("activation=gelu_tanh", "layer_norm_eps=1e-6", "logit_bias=True"),
        *("vocab_size=400", "text_cleaning=lower", "context_length=40"),
        *("vision_mlp_width=48", "text_mlp_width=40"),
    ),
    # Features wider than the text tower: the temporal head is new.
    "pe": ("activation=gelu", "context_length=32", "embed_dim=64"),
}
# Families whose files are recognised (`drl_jax/weights/description.py`).
WITH_FILES = ("siglip", "pe")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, shapes_data, tmp_path_factory):
    """A family, and the directory of a run."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    # The stored frames of the tests are cropped, with bicubic interpolation.
    fields = (f"family={family}", "resize=crop", "interpolation=bicubic", *FAMILIES[family])
    flags = [f"--config.model.backbone.{field}" for field in fields]
    if family == "siglip":
        tokenizer = write_gemma(folder / "tokenizer.json")
        flags += [f"--config.model.tokenizer={tokenizer}", "--config.loss.contrastive=sigmoid"]
    arguments = (
        "--config=configs/shapes.py:smoke",
        *TINY,
        f"--config.data.data_dir={shapes_data}",
        "--config.data.build_if_absent=False",
        "--config.train.epochs=1",
        f"--workdir={folder / 'run'}",
        *flags,
    )
    assert train(list(arguments)) == 0
    return family, folder / "run"


def test_a_run_is_trained(trained):
    family, run = trained
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["train/loss"] for entry in entries if "train/loss" in entry]
    assert losses
    assert np.isfinite(losses).all()
    assert drl_jax.load(run).config.model.backbone.family == family


@pytest.fixture
def towers_file(trained, tmp_path):
    """The towers as a publisher has them: without our metadata, with a description beside them."""
    family, run = trained
    exported = tmp_path / "towers.safetensors"
    assert convert([str(run), str(exported), "--clip_only"]) == 0
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


@pytest.mark.parametrize("trained", WITH_FILES, indirect=True)
def test_towers_alone_search_and_come_back_bit_for_bit(
    trained, towers_file, test_videos, tmp_path, capsys
):
    family, _ = trained
    of_pooling = {"siglip": "vision_model.head.attention", "pe": "visual.attn_pool.attn"}
    assert f"{of_pooling[family]}.in_proj_weight" in load_file(towers_file)
    run, again = tmp_path / "run", tmp_path / "again" / "towers.safetensors"
    assert convert([str(towers_file), str(run)]) == 0
    assert convert([str(run), str(again), "--clip_only"]) == 0
    assert_same_arrays(load_file(again), load_file(towers_file))

    (tmp_path / "videos").mkdir()
    for video in sorted(test_videos.glob("*.mp4"))[:3]:
        shutil.copy(video, tmp_path / "videos")
    index = f"--index={tmp_path / 'index'}"
    capsys.readouterr()
    arguments = (f"--weights={towers_file}", f"--videos={tmp_path / 'videos'}")
    assert search(["index", index, *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"{towers_file}: {family}, patches of " in printed
    assert "(from config.json), licence: " in printed
    assert "3 added" in printed
    # Without --weights, the model is the one that the index names.
    assert search(["query", index, "a red circle moves left", "--top=2"]) == 0
    assert capsys.readouterr().out.count(".mp4") == 2
