"""Exported programs agree with the model."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support.runs import make_run
from support.search import random_reranker

import drl_jax
from drl_jax.evaluation.reranking import RerankScorer
from drl_jax.export import FORMATS, export, main
from drl_jax.models.reranker import RerankerConfig, first_stage_sha256
from drl_jax.runs.reranker_file import RERANKER_FILE, read_reranker, reranker_path, save_reranker

CAPTIONS = ["a red circle moves left", "dogs, cats and a bird", "a blue square", "ein Mädchen"]


def run_program(directory: Path, name: str, arrays: dict) -> dict[str, np.ndarray]:
    """Runs an exported program as `model.json` describes it."""
    about = json.loads((directory / "model.json").read_text())
    program = about["programs"][name]
    path, inputs, outputs = (program[key] for key in ("file", "inputs", "outputs"))
    assert {key: str(array.dtype) for key, array in arrays.items()} == {
        key: described["dtype"] for key, described in inputs.items()
    }
    if about["format"] == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(directory / path)
        results = dict(zip(outputs, session.run(list(outputs), arrays), strict=True))
    else:
        program = jax.export.deserialize(bytearray((directory / path).read_bytes()))
        assert program.platforms == ("cpu", "cuda")
        results = {key: np.asarray(array) for key, array in program.call(**arrays).items()}
    sizes = {"A": len(CAPTIONS)}
    for named, described in ((arrays, inputs), (results, outputs)):
        for key, array in named.items():
            for size, symbol in zip(array.shape, described[key]["shape"], strict=True):
                assert size == sizes.setdefault(symbol, size if isinstance(symbol, str) else symbol)
    return results


MODELS = [("wti", "seqTransf", "clip"), ("xti", "seqLSTM", "clip"), ("ti", "none", "siglip")]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def model(request, shapes_config, tmp_path_factory) -> drl_jax.RetrievalModel:
    interaction, head, family = request.param
    backbone = dataclasses.replace(shapes_config.model.backbone, family=family)
    model = dataclasses.replace(shapes_config.model, agg_module=head, backbone=backbone)
    workdir = tmp_path_factory.mktemp("export") / "run"
    make_run(workdir, dataclasses.replace(shapes_config, model=model), interaction)
    model = drl_jax.load(workdir)
    if interaction != "xti":
        sizes = RerankerConfig.of(model.config.model, model.config.data.max_frames)
        about = {"first_stage": first_stage_sha256(model.params)}
        save_reranker(workdir / RERANKER_FILE, sizes, random_reranker(model, sizes), about)
    return model


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, model, tmp_path_factory) -> Path:
    if request.param == "onnx":
        pytest.importorskip("jax2onnx")
    directory = tmp_path_factory.mktemp("exported")
    export(model, directory, request.param, rerank=model.config.model.interaction != "xti")
    return directory


@pytest.mark.parametrize("count", [1, 7])
def test_programs_agree_with_the_model(count, model, exported):
    rng, data = np.random.default_rng(count), model.config.data
    tokens = model.tokenize(CAPTIONS)
    clips = [
        rng.integers(0, 256, (1 + row % data.max_frames, *model.frame_form.shape), np.uint8)
        for row in range(count)
    ]
    frames = np.zeros((count, data.max_frames, *model.frame_form.shape), np.uint8)
    frame_mask = np.zeros((count, data.max_frames), bool)
    for row, clip in enumerate(clips):
        frames[row, : len(clip)], frame_mask[row, : len(clip)] = clip, True
    text, video = model.encode_tokens(tokens), model.encode_videos(clips)
    ids = {"text_ids": tokens.text_ids, "text_mask": tokens.text_mask}
    texts = run_program(exported, "text", ids)
    videos = run_program(exported, "video", {"frames": frames, "frame_mask": frame_mask})
    compared = model.interaction
    assert texts.keys() == set(compared.TEXT_ARRAYS)
    assert videos.keys() == set(compared.VIDEO_ARRAYS)
    # Features of padding mean nothing.
    for found, expected, mask in ((texts, text, tokens.text_mask), (videos, video, frame_mask)):
        for name, array in found.items():
            rows = mask if array.shape[:2] == mask.shape and array.ndim == 3 else slice(None)
            np.testing.assert_allclose(array[rows], expected[name][rows], rtol=0, atol=1e-5)
    found = run_program(exported, "similarity", {**texts, **videos})["similarity"]
    similarity = model.similarity(text, video)
    np.testing.assert_allclose(found, similarity, rtol=0, atol=1e-5)
    if (path := reranker_path(model.source)).exists():
        # The model's own features: the reranker rounds them.
        given = {name: text[name] for name in texts} | {name: video[name] for name in videos}
        given = {name: np.asarray(array) for name, array in given.items()}
        found = run_program(exported, "reranked", {**given, "similarity": similarity})["reranked"]
        file = read_reranker(path, model.config, model.params)
        changes = RerankScorer(file.config).changes(file.params, text, video)
        assert np.std(changes) > 0.003
        np.testing.assert_allclose(found, similarity + changes, rtol=0, atol=1e-5)


def test_the_description_has_what_a_caller_needs(model, exported):
    about = json.loads((exported / "model.json").read_text())
    assert about["fingerprint"] == model.fingerprint
    assert about["interaction"] == model.config.model.interaction
    assert (about["max_words"], about["max_frames"]) == (24, 4)
    assert about["tokenizer"] == {"name": "CLIP", "sha256": "", "pad_id": 0}
    assert (about["frames"]["size"], about["frames"]["clock"]) == (64, "frames")
    assert about["frames"]["pixel_std"] == list(model.config.model.backbone.pixel_std)


def test_what_cannot_be_exported_is_one_line(
    search_model, search_run, tmp_path, capsys, monkeypatch
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for directory, format, message in (
        (tmp_path / "new", "tflite", "there is no format 'tflite', but stablehlo, onnx"),
        (tmp_path / "full", "stablehlo", "full is not an empty directory"),
        (tmp_path / "full" / "file", "stablehlo", "file is not an empty directory"),
        (tmp_path / "no" / "new", "stablehlo", "there is no directory"),
    ):
        with pytest.raises(drl_jax.UserError, match=message):
            export(search_model, directory, format)
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    out = f"--out={tmp_path / 'new'}"
    assert main([str(search_run), "--format=onnx", out]) == 1
    assert "pip install 'drl_jax[onnx]'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main([str(search_run), "--format=tflite", out])
    assert exit.value.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_what_onnx_lacks_is_one_line(search_model, tmp_path, monkeypatch):
    jax2onnx = pytest.importorskip("jax2onnx")

    def fail(*arguments, **options):
        raise NotImplementedError("no operator\nfor it")

    monkeypatch.setattr(jax2onnx, "to_onnx", fail)
    with pytest.raises(drl_jax.UserError, match="'text' of the model"):
        export(search_model, tmp_path / "new", "onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_model(search_run, tmp_path, capsys):
    out = tmp_path / "programs"
    assert main([str(search_run), "--format=stablehlo", f"--out={out}"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}: stablehlo, ")
    assert {path.name for path in out.iterdir()} == {
        *("model.json", "similarity.stablehlo", "text.stablehlo", "video.stablehlo")
    }
