"""Frames encoded by OpenVINO instead of JAX, in indexes and files of embeddings."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from support.commands import ROOT, error_of
from support.params import random_params
from support.towers import PE, SIGLIP, TINY
from support.videos import numbered_frames, write_video

import drl_jax
from drl_jax.config import ModelConfig
from drl_jax.embed.__main__ import main as embed
from drl_jax.evaluation import openvino_encoder
from drl_jax.evaluation.embedder import make_embed_steps
from drl_jax.evaluation.openvino_encoder import OpenVINOImages, choose_encoder
from drl_jax.models.drl import BACKBONES
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.sharding import make_layout
from drl_jax.search.__main__ import main as search
from drl_jax.search.index_file import recorded_encoder
from drl_jax.search.session import Index

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install '.[cpu]'")

FAMILIES = {"clip": {}, "siglip": SIGLIP, "pe": {**PE, "activation": "gelu"}}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", BACKBONES)
def test_features_are_those_of_jax(family, dtype):
    backbone = dataclasses.replace(TINY, vision_layers=3, **FAMILIES[family])
    model = ModelConfig(backbone, interaction="dp", agg_module="none", dtype=dtype)
    params, layout = random_params(model), make_layout(jax.devices()[:1])
    images = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3)).astype(np.uint8)
    found = OpenVINOImages(model, params)(images)
    exact = make_embed_steps(dataclasses.replace(model, dtype="float32"), layout).encode_image
    expected = np.asarray(exact(params, images, np.ones(11, bool))["image_feat"])
    assert found.shape == expected.shape
    error = np.abs(unit(found) - unit(expected)).max()
    assert error < (1e-5 if dtype == "float32" else 2e-2)
    assert len({row.tobytes() for row in found}) == 11


def test_videos_are_encoded_as_by_jax(search_model):
    model, rng = search_model.with_encoder("openvino"), np.random.default_rng(0)
    shape, most = model.frame_form.shape, model.config.data.max_frames
    videos = [rng.integers(0, 256, (1 + n % most, *shape)).astype(np.uint8) for n in range(9)]
    expected = search_model.encode_videos(videos)
    found = model.encode_videos(videos)
    assert found.keys() == expected.keys()
    mask = expected["frame_mask"]
    for name, array in expected.items():
        np.testing.assert_allclose(found[name][mask], array[mask], rtol=0, atol=1e-5, err_msg=name)
    text = search_model.encode_text(["a red circle"])
    scores = (search_model.similarity(text, arrays) for arrays in (found, expected))
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)
    assert model.with_encoder("jax").encoder == "jax"
    assert model.fingerprint == search_model.fingerprint


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for number, seconds in enumerate((2, 20)):
        frames = numbered_frames(2 * seconds, 64, 64) + np.uint8(50 * number)
        write_video(folder / f"{number}.mp4", frames, fps=2)
    return folder


def test_an_index_keeps_its_encoder(search_run, videos, tmp_path, capsys, monkeypatch):
    common = ["index", f"--workdir={search_run}", f"--videos={videos}"]
    a, b = ([*common, f"--index={tmp_path / name}"] for name in "ab")
    assert search(a) == 0
    assert recorded_encoder(tmp_path / "a") == "openvino"
    assert "frames are encoded by openvino in float32" in capsys.readouterr().out
    assert search([*b, "--encoder=jax", "--only=0.mp4"]) == 0
    capsys.readouterr()
    assert search(b) == 0
    assert "frames are encoded by jax in float32" in capsys.readouterr().out
    line = error_of("drl_jax.search", *a, "--encoder=jax", capsys=capsys)
    assert "was made with another encoder, openvino; give another directory" in line
    parts = [str(tmp_path / name) for name in "ab"]
    line = error_of("drl_jax.search", "join", f"--index={tmp_path / 'c'}", *parts, capsys=capsys)
    assert "differ in their encoder" in line
    hits = [Index(tmp_path / name).search("a red circle", top=1)[0] for name in "ab"]
    assert hits[0].score == pytest.approx(hits[1].score, abs=1e-2)  # They are stored in bfloat16.
    (videos / "new.mp4").write_bytes((videos / "0.mp4").read_bytes())
    opened = Index(tmp_path / "a")
    assert opened.add(["new.mp4"]).added == 1
    assert (opened.model.encoder, opened._updating.encoder) == ("jax", "openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    line = error_of("drl_jax.search", *a, capsys=capsys)
    assert "encoder=openvino needs OpenVINO" in line


def test_files_of_embeddings_say_their_encoder(search_run, videos, tmp_path, capsys):
    common = [f"--workdir={search_run}", f"--out={tmp_path / 'videos.npz'}"]
    assert embed([*common, f"--videos={videos}"]) == 0
    with np.load(tmp_path / "videos.npz") as file:
        assert json.loads(str(file["drl_jax"]))["--encoder"] == "openvino"
    common.append("--encoder=jax")
    line = error_of("drl_jax.embed", *common, f"--videos={videos}", capsys=capsys)
    assert "was made with another encoder" in line
    (tmp_path / "captions.txt").write_text("a circle")
    captions = f"--captions={tmp_path / 'captions.txt'}"
    line = error_of("drl_jax.embed", *common, captions, capsys=capsys)
    assert "--encoder is of videos" in line


def test_auto_is_openvino_where_it_is_installed_beside_cpus_only(monkeypatch):
    assert choose_encoder("auto") == "openvino"
    assert choose_encoder("auto", "jax") == choose_encoder("jax", "openvino") == "jax"
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert choose_encoder("auto") == "jax"
        assert choose_encoder("auto", "openvino") == "openvino"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert choose_encoder("auto") == "jax"


def test_a_tower_that_openvino_cannot_take_is_refused(search_run, monkeypatch):
    def trace(model, params):
        return jax.make_jaxpr(jax.lax.sort)(np.zeros((8, 4), np.float32))

    monkeypatch.setattr(openvino_encoder, "_trace", trace)
    model = drl_jax.load(search_run).with_encoder("openvino")
    with pytest.raises(UserError, match=r"OpenVINO .* cannot take the image tower .*sort.*jax"):
        model.encode_frames(np.zeros((1, *model.frame_form.shape), np.uint8))


def test_the_use_of_openvino_is_not_reported(tmp_path):
    """Its import by itself is, and leaves a file in the home directory."""
    code = "from drl_jax.evaluation.openvino_encoder import choose_encoder as c; assert c('auto')"
    env = {**os.environ, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "CI": ""}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)
    assert not list(tmp_path.glob("intel*"))
