"""`drl_jax.evaluate --post`: tables, protocol, and banks and splits that are refused."""

import contextlib
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from support.commands import error_of
from support.runs import make_run

import drl_jax
from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.evaluate import _POST, main
from drl_jax.evaluation.metrics import expected_ranks
from drl_jax.evaluation.post_processing import METHODS
from drl_jax.runs.evaluate_run import draw_bank
from drl_jax.runs.protocol_card import read_ranks


@pytest.fixture(scope="module")
def run(shapes_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("post") / "run"
    make_run(workdir, shapes_config, "dp")
    return workdir


@pytest.fixture(scope="module")
def printed(run):
    """What all methods print."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([f"--workdir={run}", f"--post={','.join(_POST)}", "--bank_size=50"]) == 0
    return out.getvalue()


def test_every_method_has_a_table_and_a_card_of_its_own(run, printed):
    titles = re.findall(r"^test of checkpoint 0, 32 videos, (.*), with 95 %", printed, re.M)
    assert titles == ["raw", "IS", "QB-Norm", "NNN", "DSL (uses all test queries)"]
    assert re.findall(r"^t2v ", printed, re.M) == ["t2v "] * 5
    assert _POST[1:] == tuple(METHODS)
    bank = "bank of 50 captions (t2v) and 50 videos (v2t) of train, seed 0"
    for name in METHODS:
        card = json.loads((run / f"eval_test_0_{name}.json").read_text())["card"]
        described = card["post_processing"]
        assert f"similarities: {described}" in printed
        assert "fitted on val" in described
        assert described.endswith("fitted on val" if name == "dsl" else bank)
    assert re.search(r"QB-Norm t2v k=1 beta=\d+, v2t k=1 beta=\d+, fitted", printed)
    # `compare` reads these.
    assert read_ranks(run / "eval_test_0.npz")[1].post_processing == "raw"


def test_ranks_are_those_of_the_formula(run, printed, shapes_config):
    """Inverted softmax of both directions, by the published quotient."""
    dataset = VideoDataset(dataset_dir(shapes_config))
    model, split = drl_jax.load(run), load_split(dataset, "test", shapes_config.data)
    bank = draw_bank(load_split(dataset, "train", shapes_config.data), 50)

    def encode_videos(records):
        return model.encode_videos([dataset.read_frames(record) for record in records])

    text, video = model.encode_text(split.caption_pairs()[1]), encode_videos(split.videos)
    scores = model.similarity(text, video)
    of_captions = model.similarity(model.encode_text(bank.captions), video)
    of_videos = model.similarity(text, encode_videos(bank.videos))
    ranks, card = read_ranks(run / "eval_test_0_is.npz")
    betas = map(float, re.findall(r"beta=(\d+)", card.post_processing))
    for found, own, others, beta in zip(
        (ranks.t2v, ranks.v2t), (scores, scores.T), (of_captions, of_videos.T), betas, strict=True
    ):
        own, others = np.exp(beta * own.astype(np.float64)), others.astype(np.float64)
        expected = expected_ranks(own / np.exp(beta * others).sum(axis=0), np.arange(len(own)))
        # Equal up to the rounding of float32.
        np.testing.assert_allclose(found, expected, atol=1)
        assert np.mean(found == expected) > 0.9


def test_dsl_alone_needs_no_bank(run, shapes_config, tmp_path):
    """Nor does it need a training split that the test leaves alone."""
    data = dataclasses.replace(shapes_config.data, train_split="test")
    make_run(tmp_path / "run", dataclasses.replace(shapes_config, data=data), "dp")
    assert main([f"--workdir={tmp_path / 'run'}", "--post=dsl"]) == 0
    assert not (tmp_path / "run" / "eval_test_0.json").exists()


@pytest.mark.parametrize(
    ("flags", "data", "message"),
    [
        (["--post=csls"], {}, "there is no post-processing 'csls', but none, is, qbnorm, nnn, dsl"),
        (["--bank_size=9"], {}, "bank_size is that of post=METHOD"),
        (["--post=is", "--bank_size=100000"], {}, "bank_size=100000 is more than the"),
        (["--post=is", "--split=train"], {}, "train, which shares 192 videos with the split train"),
        (["--post=dsl", "--split=val"], {}, "val, which shares 32 videos with the split val"),
        (["--post=is"], {"train_split": "val"}, "train, which shares 32 videos with the split val"),
        (["--post=nnn"], {"val_split": "dev"}, "fits its parameters on val, which is missing"),
    ],
)
def test_mistakes_are_one_line(run, shapes_config, tmp_path, flags, data, message, capsys):
    if data:
        run = tmp_path / "run"
        data = dataclasses.replace(shapes_config.data, **data)
        make_run(run, dataclasses.replace(shapes_config, data=data), "dp")
    assert message in error_of("drl_jax.evaluate", f"--workdir={run}", *flags, capsys=capsys)
