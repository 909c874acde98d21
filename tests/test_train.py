"""Training and evaluation as a user runs them: real processes, real files, real signals."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from conftest import ROOT, TINY, error_line, run_module

from drl_jax.config import ClipConfig, ModelConfig
from drl_jax.models.drl import init_params
from drl_jax.weights.load import read_weights, save_state, state_dict_from_params

METRICS = {"R@1", "R@5", "R@10", "MdR", "MnR"}


def train_arguments(data, workdir, *extra):
    return (
        "--config=configs/shapes.py:smoke",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data}",
        *TINY,
        *extra,
    )


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(shapes_data, tmp_path_factory):
    """A finished run and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    process = run_module("drl_jax.train", *train_arguments(shapes_data, workdir))
    return workdir, process.stdout


def test_the_run_leaves_what_it_promises(finished):
    workdir, printed = finished
    result = json.loads((workdir / "result.json").read_text())
    assert set(result["test"]) == {"t2v", "v2t", "pair_accuracy"}
    assert set(result["test"]["t2v"]) == set(result["test"]["v2t"]) == METRICS
    assert "pair accuracy" in printed
    for name in METRICS:
        assert name in printed
    steps = [entry["step"] for entry in read_metrics(workdir)]
    assert steps == sorted(steps)
    assert steps[-1] == result["total_steps"] == 12
    train = next(entry for entry in read_metrics(workdir) if "train/loss" in entry)
    for name in (
        "loss",
        "contrastive_loss",
        "cdcr_loss",
        "logit_scale",
        "lr",
        "lr_clip",
        "grad_norm",
        "examples_per_second",
    ):
        assert math.isfinite(train[f"train/{name}"])
    assert train["train/logit_scale"] == pytest.approx(1 / 0.07, rel=0.01)


def test_tensorboard_reads_the_same_numbers(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    workdir, _ = finished
    events = EventAccumulator(str(workdir))
    events.Reload()
    for tag in ("train/loss", "eval/t2v_R1"):
        found = [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)]
        expected = [(e["step"], e[tag]) for e in read_metrics(workdir) if tag in e]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected])


def test_evaluate_repeats_the_test_of_the_run(finished):
    workdir, _ = finished
    result = json.loads((workdir / "result.json").read_text())
    for checkpoint in ("best", str(result["best_step"])):
        run_module("drl_jax.evaluate", f"--workdir={workdir}", f"--checkpoint={checkpoint}")
        written = json.loads((workdir / f"eval_test_{result['best_step']}.json").read_text())
        assert written["metrics"] == result["test"]
    printed = run_module(
        "drl_jax.evaluate", f"--workdir={workdir}", "--checkpoint=latest", "--split=val"
    ).stdout
    assert "val of checkpoint 12, 32 videos" in printed
    latest = json.loads((workdir / "eval_val_12.json").read_text())["metrics"]["t2v"]
    logged = read_metrics(workdir)[-1]
    assert latest["R@1"] == logged["eval/t2v_R1"]


def test_a_finished_run_only_tests_again(finished, shapes_data):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    printed = run_module("drl_jax.train", *train_arguments(shapes_data, workdir)).stdout
    assert "from step 12 of 12" in printed
    assert (workdir / "metrics.jsonl").read_text() == before


def test_sigterm_saves_and_the_same_command_ends_where_it_would_have(
    finished, shapes_data, tmp_path
):
    workdir = tmp_path / "interrupted"
    arguments = train_arguments(shapes_data, workdir)
    process = subprocess.Popen(
        [sys.executable, "-m", "drl_jax.train", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (workdir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "SIGTERM: saving a checkpoint" in errors
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
    assert not (workdir / "result.json").exists()

    printed = run_module("drl_jax.train", *arguments).stdout
    assert "resuming" in printed
    whole = json.loads((finished[0] / "result.json").read_text())
    assert json.loads((workdir / "result.json").read_text()) == whole
    last = read_metrics(finished[0])[-1]
    assert read_metrics(workdir)[-1] == last
    steps = [entry["step"] for entry in read_metrics(workdir) if "train/loss" in entry]
    assert len(steps) == len(set(steps))


def test_a_second_run_compiles_nothing_again(shapes_data, tmp_path):
    """The cache is where the user's caches are; JAX_COMPILATION_CACHE_DIR turns it off."""
    arguments = (*train_arguments(shapes_data, tmp_path / "run"), "--config.train.epochs=0")
    off = {"XDG_CACHE_HOME": str(tmp_path / "off"), "JAX_COMPILATION_CACHE_DIR": ""}
    run_module("drl_jax.train", *arguments, env=off)
    assert not (tmp_path / "off" / "drl_jax").exists()

    def cached():
        return {path.name for path in (tmp_path / "on" / "drl_jax" / "xla").glob("*-cache")}

    shutil.rmtree(tmp_path / "run")
    on = {"XDG_CACHE_HOME": str(tmp_path / "on")}
    run_module("drl_jax.train", *arguments, env=on)
    first = cached()
    assert first
    shutil.rmtree(tmp_path / "run")
    run_module("drl_jax.train", *arguments, env=on)
    assert cached() == first


def test_without_tensorflow_training_says_so_and_goes_on(shapes_data, tmp_path):
    """A directory in front of the installed packages whose `tensorflow` cannot be imported."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "tensorflow.py").write_text("raise ImportError('hidden')")
    workdir = tmp_path / "run"
    printed = run_module(
        "drl_jax.train",
        *train_arguments(shapes_data, workdir, "--config.train.epochs=1"),
        env={"PYTHONPATH": str(tmp_path / "hide")},
    ).stdout
    assert "TensorFlow is not installed: no TensorBoard files, only metrics.jsonl" in printed
    assert (workdir / "result.json").exists()
    assert not list(workdir.glob("events*"))
    assert any("train/loss" in entry for entry in read_metrics(workdir))


def test_training_starts_from_foreign_weights(shapes_data, tmp_path):
    """The file's sizes are the run's; without epochs, what it brings is tested as it is."""
    clip = ClipConfig(
        embed_dim=64,
        image_resolution=64,
        vision_layers=1,
        vision_width=64,
        vision_heads=1,
        vision_patch_size=16,
        text_width=64,
        text_heads=1,
        text_layers=1,
    )
    params = init_params(ModelConfig(clip=clip), jax.random.key(1))
    save_state(tmp_path / "clip.safetensors", state_dict_from_params({"clip": params["clip"]}))
    arguments = (
        "--config=configs/shapes.py:smoke",
        f"--config.data.data_dir={shapes_data}",
        f"--config.model.init={tmp_path / 'clip.safetensors'}",
        "--config.model.interaction=dp",
        "--config.model.agg_module=none",
        "--config.loss.cdcr=0",
        "--config.train.epochs=0",
    )
    run_module("drl_jax.train", *arguments, f"--workdir={tmp_path / 'run'}")
    run_module("drl_jax.train", *arguments, f"--workdir={tmp_path / 'run'}")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["best_step"], result["total_steps"]) == (0, 0)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["clip"]["vision_width"] == 64
    exported = tmp_path / "exported.safetensors"
    run_module("drl_jax.convert", str(tmp_path / "run"), str(exported))
    assert read_weights(exported).keys() == read_weights(tmp_path / "clip.safetensors").keys()

    (tmp_path / "clip.safetensors").write_bytes(b"no weights")
    process = run_module(
        "drl_jax.train", *arguments, f"--workdir={tmp_path / 'other'}", check=False
    )
    assert "clip.safetensors is not a whole safetensors file" in error_line(process)
    assert not (tmp_path / "other").exists()


def test_evaluation_imports_neither_tensorflow_nor_torch():
    code = (
        "import drl_jax.evaluate, drl_jax.data.batches, sys;"
        "bad = {'tensorflow', 'torch', 'clu'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.typo=1", "typo"),
        ("--config.train.batch_size=many", "batch_size"),
        ("--config.train.batch_size=1000", "fewer than a batch"),
        ("--config.data.dataset=msrvtt", "python -m data_prep.build msrvtt"),
        ("--config.data.train_split=train_9k", "no split 'train_9k'"),
        ("--config=configs/nowhere.py", "nowhere.py"),
        ("--config=configs/shapes.py:huge", "has the variant smoke, not 'huge'"),
        ("extra", "unexpected argument 'extra'"),
    ],
)
def test_a_mistake_is_one_line(shapes_data, tmp_path, flag, message):
    off = "--config.data.build_if_absent=False"
    arguments = train_arguments(shapes_data, tmp_path / "run", off, flag)
    process = run_module("drl_jax.train", *arguments, check=False)
    assert message in error_line(process)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "pairs"), [("batch_size", 30), ("microbatch", 4)])
def test_a_batch_that_devices_do_not_divide(shapes_data, tmp_path, name, pairs):
    flag = f"--config.train.{name}={pairs}"
    arguments = train_arguments(shapes_data, tmp_path / "run", flag)
    process = run_module("drl_jax.train", *arguments, check=False, env={"JAX_NUM_CPU_DEVICES": "8"})
    assert f"config.train.{name}={pairs} does not divide over 8 devices" in error_line(process)


def test_a_loss_that_is_not_finite_stops_the_run(shapes_data, tmp_path):
    arguments = train_arguments(
        shapes_data, tmp_path / "run", "--config.optim.lr=1e30", "--config.optim.weight_decay=0.0"
    )
    process = run_module("drl_jax.train", *arguments, check=False)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "the loss is not finite near step" in process.stderr


def test_a_workdir_of_another_run_is_left_alone(finished, shapes_data):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    arguments = train_arguments(shapes_data, workdir, "--config.optim.lr=0.5")
    line = error_line(run_module("drl_jax.train", *arguments, check=False))
    assert "config.optim.lr was 0.0015, now 0.5" in line
    assert (workdir / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=nowhere"], "no run in nowhere"),
        (["--checkpoint=5"], "no checkpoint of step 5"),
        (["--checkpoint=first"], "best, latest or a step"),
        (["--split=dev"], "no split 'dev'"),
        (["--data_dir=nowhere"], "no dataset in nowhere"),
    ],
)
def test_evaluation_mistakes_are_one_line(finished, arguments, message):
    process = run_module("drl_jax.evaluate", f"--workdir={finished[0]}", *arguments, check=False)
    assert message in error_line(process)
