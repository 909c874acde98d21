"""Training and evaluation as a user runs them: real processes, real files, real signals."""

import datetime
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.commands import ROOT, TINY, error_of, run_module
from support.finished_runs import assert_same_run, metrics, summaries
from support.params import openai_shaped_backbone, random_params

from data_prep.build import main as build
from data_prep.shapes.scenes import SIZES
from drl_jax.config import ModelConfig
from drl_jax.convert import main as convert
from drl_jax.evaluate import main as evaluate
from drl_jax.runs.hooks import TrainingError
from drl_jax.runs.train_run import _memory_errors
from drl_jax.runs.train_seeds import format_seeds, summarise_seeds
from drl_jax.train import main as train
from drl_jax.weights.weights_file import read_weights, state_dict_from_params

METRICS = {"R@1", "R@5", "R@10", "MdR", "MnR"}


@pytest.fixture(scope="module")
def train_arguments(shapes_data, tiny_weights):
    """Makes the arguments of a tiny run in a directory."""

    def make(workdir, *extra):
        return (
            "--config=configs/shapes.py:smoke",
            f"--workdir={workdir}",
            f"--config.data.data_dir={shapes_data}",
            *TINY,
            f"--config.model.init={tiny_weights}",
            *extra,
        )

    return make


@pytest.fixture(scope="module")
def finished(train_arguments, tmp_path_factory):
    """A finished run and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    process = run_module("drl_jax.train", *train_arguments(workdir))
    return workdir, process.stdout


def test_a_run_writes_its_files(finished):
    """Also TensorBoard's, with the numbers of metrics.jsonl."""
    workdir, printed = finished
    result = json.loads((workdir / "result.json").read_text())
    assert set(result["test"]) == {"t2v", "v2t", "pair_accuracy"}
    assert set(result["test"]["t2v"]) == set(result["test"]["v2t"]) == METRICS
    assert "pair accuracy" in printed
    for name in METRICS:
        assert name in printed
    steps = [entry["step"] for entry in metrics(workdir)]
    assert steps == sorted(steps)
    assert steps[-1] == result["total_steps"] == 12
    train = next(entry for entry in metrics(workdir) if "train/loss" in entry)
    for name in (
        "loss",
        "contrastive_loss",
        "cdcr_loss",
        "logit_scale",
        "lr",
        "lr_clip",
        "t2v_loss",
        "v2t_loss",
        "word_entropy",
        "frame_entropy",
        *(
            f"{kind}_norm{group}"
            for kind in ("grad", "param", "update")
            for group in ("", "_backbone", "_new")
        ),
    ):
        assert math.isfinite(train[f"train/{name}"])
    assert train["train/logit_scale"] == pytest.approx(1 / 0.07, rel=0.01)
    assert_same_run(workdir, workdir)
    shown = summaries(workdir)
    assert "eval/t2v_R1" in shown
    assert "eval/similarity" not in shown  # `config.train.pictures` is off.


def test_a_run_says_what_its_time_was_spent_on(finished):
    workdir, printed = finished
    start = json.loads((workdir / "manifest.json").read_text())["starts"][-1]
    assert set(start["seconds"]) == {
        "start",
        "dataset",
        "compilation",
        "data",
        "steps",
        "logging",
        "checkpoints",
        "evaluation",
    }
    whole = re.search(r"^time: (\d+) s: .*\d+ %.*$", printed, re.MULTILINE)
    assert int(whole[1]) == pytest.approx(sum(start["seconds"].values()), abs=1)
    # Dates have whole seconds, and begin after the weights and the dataset were read.
    ended, started = (datetime.datetime.fromisoformat(start[name]) for name in ("ended", "started"))
    assert sum(start["seconds"].values()) > (ended - started).total_seconds() - 2


def test_too_little_memory_is_one_line(shapes_config):
    message = r"do not have enough memory \(.*RESOURCE_EXHAUSTED.*remat"
    with pytest.raises(TrainingError, match=message), _memory_errors(shapes_config):
        jnp.zeros(2**50, jnp.uint8).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError), _memory_errors(shapes_config):
        raise jax.errors.JaxRuntimeError("INTERNAL: another error")


def test_evaluate_repeats_the_test_of_the_run(finished, capsys):
    workdir, _ = finished
    result = json.loads((workdir / "result.json").read_text())
    run_module("drl_jax.evaluate", f"--workdir={workdir}")
    written = json.loads((workdir / f"eval_test_{result['best_step']}.json").read_text())
    assert written["metrics"] == result["test"]
    assert written["intervals"] == result["test_intervals"]
    assert written["card"] == result["card"]
    assert written["legacy"]["t2v"]["ranks"] >= 32
    flags = ["--checkpoint=latest", "--split=val", "--legacy"]
    assert evaluate([f"--workdir={workdir}", *flags]) == 0
    printed = capsys.readouterr().out
    assert "val of checkpoint 12, 32 videos" in printed
    assert re.search(r"^t2v +\d+\.\d \[\d+\.\d, \d+\.\d\]", printed, re.MULTILINE)
    assert "legacy, the tie rule of" in printed
    assert "checkpoint step 12, the latest; trained on train, seed 0" in printed
    latest = json.loads((workdir / "eval_val_12.json").read_text())["metrics"]["t2v"]
    assert latest["R@1"] == metrics(workdir)[-2]["eval/t2v_R1"]


def test_a_finished_run_only_tests_again(finished, train_arguments, capsys):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    assert train([*train_arguments(workdir)]) == 0
    assert "from step 12 of 12" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == before


def test_resuming_after_sigterm_gives_the_same_result(finished, train_arguments, tmp_path):
    workdir = tmp_path / "interrupted"
    arguments = train_arguments(workdir)
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
    assert process.returncode == 75
    assert "SIGTERM: stopping after the next checkpoint" in errors
    assert "rerun the command to resume" in errors
    assert "Traceback" not in errors
    assert not (workdir / "result.json").exists()

    printed = run_module("drl_jax.train", *arguments).stdout
    assert "resuming" in printed
    assert_same_run(workdir, finished[0])


def test_compiled_programs_are_cached_for_later_processes(tmp_path):
    """In the user's cache directory; an empty JAX_COMPILATION_CACHE_DIR turns the cache off."""
    code = (
        "import jax\n"
        "from drl_jax.runtime.resources import cache_compilations\n"
        "cache_compilations()\n"
        "print(jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3)))[0, 0])\n"
    )

    def run(directory, **env):
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / directory), **env}
        subprocess.run([sys.executable, "-c", code], check=True, env=env)
        return {path.name for path in (tmp_path / directory).rglob("*-cache")}

    assert run("off", JAX_COMPILATION_CACHE_DIR="") == set()
    first = run("on")
    assert first
    assert {path.parent for path in (tmp_path / "on").rglob("*-cache")} == {
        tmp_path / "on" / "drl_jax" / "xla"
    }
    assert run("on") == first


def test_training_without_tensorboard_and_tensorflow_continues(train_arguments, tmp_path):
    """A directory in front of the installed packages, where neither can be imported."""
    (tmp_path / "hide").mkdir()
    for name in ("tensorflow", "tensorboard"):
        (tmp_path / "hide" / f"{name}.py").write_text("raise ImportError('hidden')")
    workdir = tmp_path / "run"
    printed = run_module(
        "drl_jax.train",
        *train_arguments(workdir),
        env={"PYTHONPATH": str(tmp_path / "hide")},
    ).stdout
    assert "TensorBoard is not installed: no TensorBoard files, only metrics.jsonl" in printed
    assert (workdir / "result.json").exists()
    assert not list(workdir.glob("events*"))
    assert any("train/loss" in entry for entry in metrics(workdir))


def test_training_starts_from_foreign_weights(shapes_data, tmp_path, capsys):
    """The run takes the sizes of the file; without epochs, its weights are tested unchanged."""
    params = random_params(ModelConfig(backbone=openai_shaped_backbone(64)))
    weights = tmp_path / "clip.safetensors"
    save_file(state_dict_from_params({"backbone": params["backbone"]}), weights)
    arguments = (
        "--config=configs/msrvtt.py",
        "--config.data.dataset=shapes",
        "--config.data.storage=raw",
        "--config.data.max_frames=4",
        "--config.data.train_split=train",
        "--config.data.val_split=val",
        "--config.data.holdout=0",
        f"--config.data.data_dir={shapes_data}",
        f"--config.model.init={weights}",
        "--config.model.interaction=dp",
        "--config.model.agg_module=none",
        "--config.loss.cdcr=0",
        "--config.train.epochs=0",
        "--config.eval.batch_size=32",
        "--config.eval.text_block=32",
    )
    for _ in range(2):  # The second time, the run is resumed.
        assert train([*arguments, f"--workdir={tmp_path / 'run'}"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["best_step"], result["total_steps"]) == (0, 0)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["backbone"]["vision_width"] == 64
    exported = tmp_path / "exported.safetensors"
    assert convert([str(tmp_path / "run"), str(exported)]) == 0
    expected, found = (read_weights(path).state for path in (weights, exported))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)

    weights.write_bytes(b"no weights")
    line = error_of("drl_jax.train", *arguments, f"--workdir={tmp_path / 'other'}", capsys=capsys)
    assert "clip.safetensors is not a complete safetensors file" in line
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_few_steps_learn_from_the_installed_clip(tmp_path, monkeypatch):
    """To R@1 25 in 40 steps; zero-shot is 12. Without learning it ends at 4, with wrong pairs at
    0.4, and with permuted token ids, which the model learns anew, at 11."""
    monkeypatch.setitem(SIZES, "smoke", (960, 256, 32))
    data, workdir = tmp_path / "data", tmp_path / "run"
    assert build(["shapes", "--size=smoke", f"--data_dir={data}"]) == 0
    # In its own process, on one device.
    run_module(
        "drl_jax.train",
        "--config=configs/shapes.py",
        f"--config.data.data_dir={data}",
        "--config.train.epochs=4",
        # Compiles one layer instead of four, but optimises it, unlike the other tests: the steps
        # take half as long.
        "--config.model.scan_unroll=1",
        f"--workdir={workdir}",
        env={"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=1"},
    )
    result = json.loads((workdir / "result.json").read_text())
    assert result["val"]["t2v"]["R@1"] > 18


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.typo=1", "typo"),
        ("--config.train.batch_size=many", "batch_size"),
        ("--config.train.batch_size=1000", "fewer than a batch"),
        ("--config.data.dataset=msrvtt", "python -m data_prep.build msrvtt"),
        ("--config.data.train_split=train_9k", "no split 'train_9k'"),
        ("--config=configs/nowhere.py", "nowhere.py"),
        ("--config=configs/shapes.py:huge", "has the variants scratch and smoke, not 'huge'"),
        ("extra", "unexpected argument 'extra'"),
    ],
)
def test_a_mistake_is_one_line(train_arguments, tmp_path, flag, message, capsys):
    off = "--config.data.build_if_absent=False"
    arguments = train_arguments(tmp_path / "run", off, flag)
    assert message in error_of("drl_jax.train", *arguments, capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_a_split_of_one_video_is_refused_before_the_training(train_arguments, tmp_path, capsys):
    flags = ("--config.data.val_split=", "--config.data.holdout=1")
    arguments = train_arguments(tmp_path / "run", *flags)
    line = error_of("drl_jax.train", *arguments, capsys=capsys)
    assert "the split val of " in line
    assert "has 1 video(s); metrics need at least two" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "pairs"), [("batch_size", 30), ("microbatch", 4)])
def test_a_batch_that_is_not_divisible_by_the_devices(
    train_arguments, tmp_path, name, pairs, capsys
):
    flag = f"--config.train.{name}={pairs}"
    arguments = train_arguments(tmp_path / "run", flag)
    line = error_of("drl_jax.train", *arguments, capsys=capsys)
    assert f"config.train.{name}={pairs} is not divisible by the 8 devices" in line


def test_a_workdir_of_another_run_is_refused(finished, train_arguments, capsys):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    lr = json.loads(before)["optim"]["lr"]
    arguments = train_arguments(workdir, "--config.optim.lr=0.5")
    line = error_of("drl_jax.train", *arguments, capsys=capsys)
    assert f"config.optim.lr was {lr}, now 0.5" in line
    assert (workdir / "config.json").read_text() == before


@pytest.fixture(scope="module")
def seeds(finished, train_arguments, tmp_path_factory):
    """A directory of runs with the seeds 0, whose test was missing, and 1, and what was printed."""
    workdir = tmp_path_factory.mktemp("runs") / "seeds"
    shutil.copytree(finished[0], workdir / "seed_0")
    (workdir / "seed_0" / "result.json").unlink()
    process = run_module("drl_jax.train", *train_arguments(workdir, "--seeds=0,1"))
    return workdir, process.stdout


def result_of(run):
    return json.loads((run / "result.json").read_text())


def test_each_seed_is_a_run(seeds, finished):
    workdir, printed = seeds
    assert f"resuming {workdir / 'seed_0'} from step 12 of 12" in printed
    assert_same_run(workdir / "seed_0", finished[0])
    summary = json.loads((workdir / "seeds.json").read_text())
    assert [run["seed"] for run in summary["runs"]] == [0, 1]
    recalls = []
    for run in summary["runs"]:
        result = result_of(workdir / run["workdir"])
        assert {name: result[name] for name in ("test", "best_step", "card")}.items() <= run.items()
        assert result["card"]["seeds"] == [run["seed"]]
        recalls.append(result["test"]["t2v"]["R@1"])
    found = {name: values["t2v R@1"] for name, values in summary["summary"].items()}
    assert found["mean"] == pytest.approx(statistics.mean(recalls))
    assert found["std"] == pytest.approx(statistics.stdev(recalls))
    assert found["worst"] == min(recalls)
    assert summary["card"]["seeds"] == [0, 1]
    assert len({run["card"]["parameters_sha256"] for run in summary["runs"]}) == 2


def test_finished_seeds_are_not_trained_again(seeds, train_arguments, capsys):
    workdir = seeds[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("seed_*/*")}
    written = (workdir / "seeds.json").read_text()
    capsys.readouterr()
    assert train(train_arguments(workdir, "--seeds=0,1")) == 0
    printed = capsys.readouterr().out
    assert f"seed 1, 2 of 2: finished in {workdir / 'seed_1'}" in printed
    assert "seeds 0, 1" in printed
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("seed_*/*")} == before
    assert (workdir / "seeds.json").read_text() == written


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds=0,0"], "names a seed twice"),
        (["--seeds=0,x"], "must be a list of seeds such as 0,1,2, not '0,x'"),
        (["--seeds=4294967296"], "must be a list of seeds"),
        (["--seeds=1", "--config.optim.lr=0.5"], "config.optim.lr was"),
    ],
)
def test_mistakes_with_seeds_are_one_line(seeds, train_arguments, flags, message, capsys):
    arguments = train_arguments(seeds[0], *flags)
    assert message in error_of("drl_jax.train", *arguments, capsys=capsys)


def test_a_run_is_no_place_for_seeds(finished, train_arguments, capsys):
    run = finished[0]
    line = error_of("drl_jax.train", *train_arguments(run, "--seeds=3"), capsys=capsys)
    assert f"{run} holds a run, and --seeds makes a directory of runs" in line
    manifest = run / "manifest.json"
    line = error_of("drl_jax.train", f"--reproduce={manifest}", "--seeds=3", capsys=capsys)
    assert "--seeds goes with --config" in line


def test_mean_deviation_and_worst():
    tests = {0: {"t2v R@1": 40.0, "t2v MdR": 2.0}, 1: {"t2v R@1": 44.0, "t2v MdR": 1.0}}
    summary = summarise_seeds(list(tests.values()))
    assert summary["mean"] == {"t2v R@1": 42.0, "t2v MdR": 1.5}
    assert summary["std"]["t2v R@1"] == pytest.approx(8**0.5)
    assert summary["worst"] == {"t2v R@1": 40.0, "t2v MdR": 2.0}
    rows = [line.split() for line in format_seeds(tests, summary).splitlines()]
    assert rows[1] == ["seed", "0", "40.0", "2.0"]
    assert rows[-2:] == [["std", "2.8", "0.7"], ["worst", "40.0", "2.0"]]
    alone = summarise_seeds([tests[0]])
    assert alone["std"] == {"t2v R@1": None, "t2v MdR": None}
    assert format_seeds({0: tests[0]}, alone).splitlines()[-2].split() == ["std", "-", "-"]


def test_results_have_the_card_of_their_protocol(finished, tiny_weights):
    workdir, printed = finished
    card = result_of(workdir)["card"]
    assert (card["dataset"], card["split"], card["ties"]) == ("shapes", "test", "expected rank")
    assert (card["videos"], card["captions"], card["captions_per_video"]) == (32, 32, [1, 1])
    assert card["post_processing"] == "raw"
    assert card["chosen"] == "the best by t2v R@1 on val"
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert card["content"] == manifest["dataset"]["content"]
    assert (card["init"], card["init_sha256"]) == (str(tiny_weights), manifest["weights_sha256"])
    assert "32 captions, 1 a video" in printed
    assert card["parameters_sha256"][:12] in printed


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
def test_evaluation_mistakes_are_one_line(finished, arguments, message, capsys):
    arguments = (f"--workdir={finished[0]}", *arguments)
    assert message in error_of("drl_jax.evaluate", *arguments, capsys=capsys)
