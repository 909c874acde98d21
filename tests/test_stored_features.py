"""Training on stored features: of the frozen towers, and of an extractor of one's own."""

import dataclasses
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from support.commands import ROOT, error_of, run_module, start_module, wait_for
from support.params import assert_same_arrays

import drl_jax
from drl_jax.config import LossConfig, ModelConfig, OptimConfig
from drl_jax.data.batches import TrainBatches, load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.embed.__main__ import main as embed
from drl_jax.evaluate import main as evaluate
from drl_jax.models.extractors import EXTRACTORS
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.runs.run_params import with_backbone_of
from drl_jax.runs.stored_features import FeaturesError, _about, _claim, stored_features
from drl_jax.runs.workdir import changed_fields, load_config
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.plugins import load_plugins
from drl_jax.runtime.sharding import make_layout
from drl_jax.search.__main__ import main as search
from drl_jax.train import main as train
from drl_jax.training.train_step import make_gradient
from drl_jax.training.trainable import Trainable
from drl_jax.weights.load import initial_params
from drl_jax.weights.weights_file import read_weights

PLUGIN = ROOT / "tests" / "support" / "plugin_features.py"
HEADS = "--config.optim.trainable=temporal,interaction,logit_scale"
SHORT = "--config.train.epochs=1"
COLOURS = (
    f"--plugin={PLUGIN}",
    "--config.model.init=",
    "--config.model.backbone.family=colours",
    "--config.model.backbone.embed_dim=32",
    "--config.loss.cdcr=0",
)


@pytest.fixture(autouse=True)
def nothing_is_registered():
    EXTRACTORS.clear()
    yield
    EXTRACTORS.clear()


@pytest.fixture(scope="module")
def feature_run(tiny_arguments, tmp_path_factory) -> tuple[Path, Path]:
    """A run of heads on stored features, and their directory."""
    root = tmp_path_factory.mktemp("stored")
    features = root / "features"
    run_module("drl_jax.train", *tiny_arguments(root / "run", HEADS, f"--features={features}"))
    return root / "run", features


# ---------------------------------------------------------------- the same mathematics


def test_gradients_are_those_of_whole_training(shapes_config, tmp_path):
    init = dataclasses.replace(ModelConfig(), init="shapes_clip", temporal_layers=1)
    weights = read_weights(init.init, init.release, init.weights_key)
    config = with_backbone_of(dataclasses.replace(shapes_config, model=init), weights)
    params = initial_params(config.model, weights, jax.random.key(0))
    layout, dataset = make_layout(), VideoDataset(dataset_dir(config))
    splits = [load_split(dataset, name, config.data) for name in ("train", "val", "test")]
    trainable = Trainable.of(OptimConfig(trainable=HEADS.rpartition("=")[2]))
    loss = LossConfig(cdcr_lambda=0.1, margin=0.1)

    def gradient(features, microbatch):
        tokenizer = load_tokenizer(config.model)
        batches = TrainBatches(dataset, splits[0], config.data, 16, 0, tokenizer, features)
        batch = next(batches.on_devices(3, layout))
        function = make_gradient(config.model, loss, layout, trainable, microbatch)
        compiled = jax.jit(layout.on_mesh(function, "float32"))
        grads, _ = compiled(*trainable.split(params), batch, jax.random.key(0))
        return flatten_dict(jax.device_get(grads))

    def gradient_of_stored(dtype):
        data = dataclasses.replace(
            config.data, features=str(tmp_path / dtype), features_dtype=dtype
        )
        stored = dataclasses.replace(config, data=data)
        return gradient(stored_features(stored, dataset, splits, params, layout), 8)

    expected, found = gradient(None, 0), gradient_of_stored("float32")
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        bound = 1e-6 * max(np.abs(leaf).max(), 1.0)
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=bound, err_msg=str(path))
    one, other = (
        np.concatenate([leaf.ravel() for leaf in tree.values()])
        for tree in (gradient_of_stored("bfloat16"), expected)
    )
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) >= 0.9999


def test_evaluation_through_the_towers_agrees(feature_run):
    workdir, _ = feature_run
    result = json.loads((workdir / "result.json").read_text())
    found = drl_jax.evaluate(workdir)
    for direction in ("t2v", "v2t"):
        # Of 32 videos; bfloat16 may change the rank of one.
        difference = found.metrics[direction]["R@1"] - result["test"][direction]["R@1"]
        assert abs(difference) <= 100 / 32 + 1e-6


# ---------------------------------------------------------------- interruptions and damage


def test_a_killed_process_continues_bit_for_bit(feature_run, tiny_arguments, tmp_path):
    workdir, features = feature_run
    own = tmp_path / "features"
    arguments = tiny_arguments(tmp_path / "run", HEADS, f"--features={own}")

    def start_and_stop(when, number):
        process = start_module("drl_jax.train", *arguments)
        while not when() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        wait_for(process)

    start_and_stop(lambda: len(list(own.glob("*.json"))) > 2, signal.SIGKILL)
    assert not (own / "texts-00003.json").exists()
    metrics = tmp_path / "run" / "metrics.jsonl"
    start_and_stop(lambda: metrics.exists() and metrics.stat().st_size, signal.SIGKILL)
    process = start_module("drl_jax.train", *arguments)
    wait_for(process)
    assert process.returncode == 0
    for path in features.glob("*.npy"):
        assert (own / path.name).read_bytes() == path.read_bytes()
    found, expected = (load_file(run / "best.safetensors") for run in (tmp_path / "run", workdir))
    assert_same_arrays(found, expected)


def test_features_of_something_else_are_refused(feature_run, tiny_arguments, tmp_path, capsys):
    _, features = feature_run
    arguments = tiny_arguments(tmp_path / "run", HEADS, f"--features={features}")
    for change, problem in (
        ("--config.data.max_words=20", "max_words: 24 there, 20 here"),
        (
            "--config.data.features_dtype=float32",
            "features_dtype: bfloat16 there, float32 here",
        ),
        ("--config.optim.trainable=", "frozen towers"),
        ("--config.optim.trainable=image,temporal", "frozen towers"),
        ("--config.model.init=", "needs trained towers"),
    ):
        assert problem in error_of("drl_jax.train", *arguments, change, capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_features_are_known_by_all_that_they_depend_on(shapes_config, tmp_path):
    dataset = SimpleNamespace(content="")

    def about(config, **backbone):
        changed = dataclasses.replace(config.model.backbone, **backbone)
        model = dataclasses.replace(config.model, backbone=changed)
        config = dataclasses.replace(config, model=model)
        return _about(config, dataset, np.arange(2), ["a"], None)

    expected = about(shapes_config)
    for changes in (
        {"activation": "gelu_tanh"},
        {"vision_heads": 4},
        {"pixel_mean": (0.5, 0.5, 0.5)},
    ):
        assert about(shapes_config, **changes) != expected
    data = dataclasses.replace(shapes_config.data, features="x", data_dir="y", num_threads=3)
    assert about(dataclasses.replace(shapes_config, data=data), logit_bias=True) == expected
    load_plugins([str(PLUGIN)])
    extracted = about(shapes_config, family="colours")
    assert about(shapes_config, family="colours", activation="gelu") == extracted
    EXTRACTORS["colours"].VERSION = "2"
    assert about(shapes_config, family="colours") != extracted
    # A directory without any features is nobody's.
    _claim(tmp_path, expected)
    _claim(tmp_path, extracted)
    (tmp_path / "frames-00000.npy").touch()
    _claim(tmp_path, extracted)
    with pytest.raises(FeaturesError, match=r"are of something else \(weights: "):
        _claim(tmp_path, expected)


def test_stored_features_may_be_moved(feature_run, tmp_path):
    config = load_config(feature_run[0])
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, features="moved"))
    assert changed_fields(config, moved) == []
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, features=""))
    assert changed_fields(config, without) == ["data.features"]


def test_a_refusal_without_a_number_is_said():
    refused = OSError("100 requested and 20 written")
    refused.filename = "file"  # As `files.naming` does.
    error = Unavailable("other", refused, "written")
    assert "file cannot be written: 100 requested and 20 written; nothing" in str(error)


def test_a_damaged_part_is_computed_again(feature_run, tiny_arguments, tmp_path, capsys):
    _, features = feature_run
    part = features / "frames-00001.npy"
    intact = part.read_bytes()
    part.write_bytes(intact[:-3] + b"abc")
    (features / "texts-00000.json").write_text("{}")
    (features / "frames-00000.npy").unlink()
    assert train(tiny_arguments(tmp_path / "run", HEADS, f"--features={features}", SHORT)) == 0
    said = capsys.readouterr().err
    assert "frames-00001.npy is damaged" in said
    assert "texts-00000.npy is damaged" in said
    found, expected = (np.frombuffer(data, np.uint16) for data in (part.read_bytes(), intact))
    assert (found == expected).mean() > 0.95  # Of another number of devices.


# ---------------------------------------------------------------- an extractor of one's own


def test_an_extractor_trains_evaluates_and_is_searched(
    tiny_arguments, test_videos, tmp_path, capsys
):
    workdir, index = tmp_path / "run", tmp_path / "index"
    arguments = tiny_arguments(workdir, *COLOURS, "--config.train.batch_size=32")
    assert "give --features=DIR" in error_of("drl_jax.train", *arguments, capsys=capsys)
    assert train([*arguments, f"--features={tmp_path / 'f'}"]) == 0
    result = json.loads((workdir / "result.json").read_text())
    assert [
        row["field"] for row in json.loads((workdir / "manifest.json").read_text())["plugins"]
    ] == ["backbone.family"]
    EXTRACTORS.clear()
    with pytest.raises(UserError, match="--plugin="):
        drl_jax.load(workdir)
    load_plugins([str(PLUGIN)])
    found = drl_jax.evaluate(workdir).metrics["t2v"]["R@1"]
    assert abs(found - result["test"]["t2v"]["R@1"]) <= 100 / 32 + 1e-6
    model = drl_jax.load(workdir)
    text, video = (
        model.encode_text(["a red circle"]),
        model.encode_videos(sorted(test_videos.glob("*.mp4"))[:3]),
    )
    expected = model.similarity(text, video)[0]
    hits = drl_jax.Index(index, model)
    hits.add(test_videos)
    assert {hit.path.name for hit in hits.search("a red circle", top=32)} == {
        path.name for path in test_videos.glob("*.mp4")
    }
    flags = [f"--index={index}", f"--plugin={PLUGIN}"]
    assert search(["query", "a red circle moves left", *flags]) == 0
    assert np.isfinite(expected).all()
    out = tmp_path / "out.npz"
    assert embed([f"--videos={test_videos}", f"--out={out}", f"--workdir={workdir}", flags[1]]) == 0
    assert evaluate([f"--workdir={workdir}", flags[1], f"--report={tmp_path / 'report'}"]) == 0


def test_an_extractor_that_gives_something_else_is_named(capsys, tmp_path):
    class Wrong(drl_jax.FeatureExtractor):
        CHANNELS, IMAGE_SIZE = 8, 32

        def encode_frames(self, frames):
            return np.zeros((len(frames), 7))

        def encode_tokens(self, texts):
            return [np.full((2, 8), np.nan) for _ in texts]

    drl_jax.register_feature_extractor("wrong", Wrong)
    from drl_jax.models.extractors import frame_features, text_features

    with pytest.raises(UserError, match=r"wrong: encode_frames gives \(1, 7\), not \[1, 8\]"):
        frame_features("wrong", np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="wrong: encode_tokens gives values that are not finite"):
        text_features("wrong", ["a"])
    with pytest.raises(UserError, match="'clip' is a family of towers"):
        drl_jax.register_feature_extractor("clip", Wrong)
    with pytest.raises(UserError, match="does not define encode_tokens"):
        drl_jax.register_feature_extractor(
            "other", type("Other", (drl_jax.FeatureExtractor,), {"encode_frames": None})
        )
