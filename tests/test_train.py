"""Training and evaluation as a user runs them, and what the files of a run say."""

import contextlib
import datetime
import io
import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from support.commands import ROOT, error_of, run_module, start_module, wait_for
from support.finished_runs import assert_same_run, metrics, summaries
from support.params import openai_shaped_backbone, random_params
from support.processes import wait_until

import drl_jax
from data_prep.build import main as build
from data_prep.shapes.scenes import SIZES
from drl_jax.config import ModelConfig
from drl_jax.convert import main as convert
from drl_jax.evaluate import main as evaluate
from drl_jax.evaluation.evaluator import Evaluator
from drl_jax.evaluation.metrics import METRICS
from drl_jax.models.reference_names import state_dict_from_params
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.hooks import TrainingError, has_pictures
from drl_jax.runs.log_files import read_scalars
from drl_jax.runs.train_run import _memory_errors
from drl_jax.runs.train_seeds import format_seeds, summarise_seeds
from drl_jax.train import main as train
from drl_jax.weights.weights_file import read_weights


@pytest.fixture(scope="module")
def arguments(tiny_arguments):
    """Makes the arguments of a run of two epochs of 6 steps."""

    def make(workdir, *extra):
        logs = ("--config.train.log_every=4", "--config.train.pictures=True")
        return tiny_arguments(workdir, *logs, *extra)

    return make


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A finished run with a profile, and what it printed. Not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train(arguments(workdir, "--profile_steps=3:4")) == 0
    return workdir, printed.getvalue()


def result_of(run):
    return json.loads((run / "result.json").read_text())


def test_the_best_parameters_of_a_complete_run_open_without_orbax(finished, tmp_path):
    """Damaged, or of another run, they are those of the checkpoint."""
    workdir, _ = finished
    code = (
        "import sys, drl_jax; model = drl_jax.load(sys.argv[1]);"
        "assert 'orbax.checkpoint' not in sys.modules; print(model.fingerprint, model.source)"
    )
    found = subprocess.run([sys.executable, "-c", code, workdir], cwd=ROOT, capture_output=True)
    model = drl_jax.load(workdir)
    assert found.stdout.decode().split(maxsplit=1) == [model.fingerprint, f"{model.source}\n"]
    assert model.source["checkpoint"] == str(result_of(workdir)["best_step"])
    copy = shutil.copytree(workdir, tmp_path / "copy")
    (file,) = copy.glob("*.safetensors")
    content = file.read_bytes()
    for damaged in (None, content[:-9], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert drl_jax.load(copy).fingerprint == model.fingerprint


# ---------------------------------------------------------------- what a run writes


def test_a_result_has_metrics_and_the_card_of_its_protocol(finished, tiny_weights):
    workdir, printed = finished
    result, manifest = result_of(workdir), json.loads((workdir / "manifest.json").read_text())
    assert set(result["test"]) == {"t2v", "v2t", "pair_accuracy"}
    assert set(result["test"]["t2v"]) == set(result["test"]["v2t"]) == set(METRICS)
    for text in (*METRICS, "pair accuracy", "32 captions, 1 a video"):
        assert text in printed
    card = result["card"]
    assert (card["dataset"], card["split"], card["ties"]) == ("shapes", "test", "expected rank")
    assert (card["videos"], card["captions"], card["captions_per_video"]) == (32, 32, [1, 1])
    assert card["post_processing"] == "raw"
    assert card["chosen"] == "the best by t2v R@1 on val"
    assert card["content"] == manifest["dataset"]["content"]
    assert (card["init"], card["init_sha256"]) == (str(tiny_weights), manifest["weights_sha256"])
    assert card["parameters_sha256"][:12] in printed


def test_scalars_of_a_run(finished):
    """In metrics.jsonl, and the same in TensorBoard."""
    workdir, _ = finished
    lines = read_scalars(workdir)
    assert lines[-1]["step"] == 12
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == [4, 6, 8, 12]
    kinds, groups = ("grad", "param", "update"), ("", "_backbone", "_new")
    norms = [f"{kind}_norm{group}" for kind in kinds for group in groups]
    others = "cdcr_loss lr lr_clip word_entropy frame_entropy"
    for name in (*others.split(), *norms):
        assert math.isfinite(trained[0][f"train/{name}"])
    assert [line["step"] for line in lines if "train/param_norm" in line] == [4, 8, 12]
    for line in trained:
        both = line["train/t2v_loss"] + line["train/v2t_loss"]
        assert both / 2 == pytest.approx(line["train/contrastive_loss"], rel=1e-6)
        assert line["train/logit_scale"] == pytest.approx(1 / 0.07, rel=0.01)
        assert line["train/data_seconds"] >= 0
        assert "train/mfu" not in line  # No peak of a CPU is known.
    assert_same_run(workdir, workdir)


def test_pictures_of_evaluations(finished):
    assert has_pictures(0, 0)
    assert [epoch for epoch in range(1, 11) if has_pictures(epoch, 10)] == [1, 2, 4, 8, 10]
    shown = summaries(finished[0])
    tags = {"eval/similarity", *(f"eval/words_and_frames_{number}" for number in (1, 2))}
    assert tags < shown.keys()
    for tag in tags:
        assert [step for step, _ in shown[tag]] == [6, 12]
        pictures = [Image.open(io.BytesIO(value)).convert("RGB") for _, value in shown[tag]]
        # A picture of one tag has one size, and changes with the parameters.
        assert pictures[0].size == pictures[1].size
        assert min(pictures[0].size) > 300
        assert len(pictures[0].getcolors(1 << 24)) > 50
        assert pictures[0].tobytes() != pictures[1].tobytes()


def test_texts_and_hyperparameters(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    workdir, _ = finished
    shown = summaries(workdir)
    ((step, config),), ((_, parameters),) = shown["run/config"], shown["run/parameters"]
    assert step == 0
    assert "| optim.lr | `0.0015` |" in config.decode()
    assert "backbone/token_embedding/embedding" in parameters.decode()

    events = EventAccumulator(str(workdir))
    events.Reload()
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(content["_hparams_/session_start_info"])
    assert start.hparams["model.interaction"].string_value == "wti"
    assert start.hparams["optim.lr"].number_value == 0.0015
    assert "train.log_every" not in start.hparams
    experiment = metadata.parse_experiment_plugin_data(content["_hparams_/experiment"])
    assert {info.name for info in experiment.hparam_infos} == set(start.hparams)
    for metric in experiment.metric_infos:
        direction, name = metric.name.tag.removeprefix("test/").split("_")
        tested = result_of(workdir)["test"][direction][re.sub(r"R(\d)", r"R@\1", name)]
        assert shown[metric.name.tag] == [(12, pytest.approx(tested))]


def test_a_profile_of_some_steps(finished):
    (trace,) = (finished[0] / "plugins" / "profile").glob("*/*.xplane.pb")
    assert b"train_step" in trace.read_bytes()


def test_a_run_says_what_its_time_was_spent_on(finished):
    workdir, printed = finished
    start = json.loads((workdir / "manifest.json").read_text())["starts"][-1]
    activities = "start dataset compilation data steps logging checkpoints evaluation profile"
    assert set(start["seconds"]) == set(activities.split())
    whole = re.search(r"^time: (\d+) s: .*\d+ %.*$", printed, re.MULTILINE)
    assert int(whole[1]) == pytest.approx(sum(start["seconds"].values()), abs=1)
    # Dates have whole seconds, and begin after the weights and the dataset were read.
    ended, started = (datetime.datetime.fromisoformat(start[name]) for name in ("ended", "started"))
    assert sum(start["seconds"].values()) > (ended - started).total_seconds() - 2


def test_evaluate_repeats_the_test_of_the_run(finished, capsys):
    workdir, _ = finished
    result = result_of(workdir)
    assert evaluate([f"--workdir={workdir}"]) == 0
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


# ---------------------------------------------------------------- starts and stops


def test_a_stopped_run_resumes_to_the_same_result(finished, arguments, tmp_path, capsys):
    """After SIGHUP and SIGTERM; until then, a second training in its directory is refused."""
    workdir = tmp_path / "stopped"
    # Under nohup, a training would ignore SIGHUP.
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    command = ("drl_jax.train", *arguments(workdir))
    process = start_module(*command, env={"JAX_NUM_CPU_DEVICES": "8"})
    signal.signal(signal.SIGHUP, previous)
    try:
        wait_until((workdir / "metrics.jsonl").exists, process)
        process.send_signal(signal.SIGSTOP)
        holder = f"the run in {workdir} is in use by process {process.pid} on host"
        assert holder in error_of(*command, capsys=capsys)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGCONT):
            process.send_signal(number)
    finally:
        _, errors = wait_for(process)
    assert process.returncode == 75
    for name in ("SIGHUP", "SIGTERM"):
        assert f"{name}: stopping after the next checkpoint" in errors
    assert "rerun the command to resume" in errors
    assert "Traceback" not in errors
    assert not (workdir / "result.json").exists()
    last_start = json.loads((workdir / "manifest.json").read_text())["starts"][-1]
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == last_start["last_step"] > 0
    assert last_start["outcome"].startswith("Interrupted: stopped after step")

    assert train(arguments(workdir)) == 0
    assert f"resuming {workdir} from step {last_start['last_step']} of" in capsys.readouterr().out
    assert_same_run(workdir, finished[0])


def test_training_without_tensorboard_and_tensorflow(arguments, tmp_path, monkeypatch, capsys):
    for name in ("tensorflow", "tensorboard", "tensorboard.compat.proto.event_pb2"):
        monkeypatch.setitem(sys.modules, name, None)
    workdir = tmp_path / "run"
    assert train(arguments(workdir)) == 0
    message = "TensorBoard is not installed: no TensorBoard files, only metrics.jsonl"
    assert message in capsys.readouterr().out
    assert (workdir / "result.json").exists()
    assert not list(workdir.glob("events*"))
    assert any("train/loss" in entry for entry in metrics(workdir))


def test_training_starts_from_foreign_weights(shapes_data, tmp_path):
    """The run takes the sizes of the file; without epochs, its weights are tested unchanged."""
    params = random_params(ModelConfig(backbone=openai_shaped_backbone(64)))
    weights, exported = tmp_path / "clip.safetensors", tmp_path / "exported.safetensors"
    save_file(state_dict_from_params({"backbone": params["backbone"]}), weights)
    values = {
        **{"data.dataset": "shapes", "data.storage": "raw", "data.data_dir": shapes_data},
        **{"data.max_frames": 4, "data.holdout": 0},
        **{"data.train_split": "train", "data.val_split": "val"},
        **{"model.init": weights, "model.interaction": "dp", "model.agg_module": "none"},
        **{"loss.cdcr": 0, "train.epochs": 0, "eval.batch_size": 32, "eval.text_block": 32},
    }
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    for _ in range(2):  # The second time, the run is resumed.
        assert train(["--config=configs/msrvtt.py", *flags, f"--workdir={tmp_path / 'run'}"]) == 0
    result = result_of(tmp_path / "run")
    assert (result["best_step"], result["total_steps"]) == (0, 0)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["backbone"]["vision_width"] == 64
    assert convert([str(tmp_path / "run"), str(exported)]) == 0
    expected, found = (read_weights(path).state for path in (weights, exported))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.slow
def test_a_few_steps_learn_from_the_installed_clip(tmp_path, monkeypatch):
    """To R@1 33 in 10 steps; zero-shot is 10."""
    monkeypatch.setitem(SIZES, "smoke", (480, 128, 32))
    data, workdir = tmp_path / "data", tmp_path / "run"
    assert build(["shapes", "--size=smoke", f"--data_dir={data}"]) == 0
    # In its own process, on one device.
    run_module(
        "drl_jax.train",
        "--config=configs/shapes.py",
        f"--config.data.data_dir={data}",
        "--config.train.epochs=2",
        "--config.train.pictures=False",
        # Compiles one layer instead of four.
        "--config.model.scan_unroll=1",
        f"--workdir={workdir}",
    )
    assert result_of(workdir)["val"]["t2v"]["R@1"] > 20


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config.train.epoch=1", "config.train has no field 'epoch' (did you mean epochs?)"),
        ("--config.seed.x=1", "--config.seed.x: config.seed is a value, not a group of fields"),
        ("--config.train.batch_size=many", "batch_size"),
        ("--config.train.batch_size=1000", "fewer than a batch"),
        ("--config.train.microbatch=4", "config.train.microbatch=4 is not divisible by the 8 dev"),
        ("--config.data.dataset=msrvtt", "python -m data_prep.build msrvtt"),
        ("--config.data.train_split=train_9k", "no split 'train_9k'"),
        (
            "--config.data.val_split= --config.data.holdout=1",
            "has 1 video(s); metrics need at least two",
        ),
        ("--config=configs/nowhere.py", "configs/nowhere.py"),
        ("--config=configs/shapes.py:huge", "has the variants scratch and smoke, not 'huge'"),
        ("extra", "unexpected argument 'extra'"),
        ("--reproduce=nowhere.json", "not allowed with argument --config"),
        ("--profile_steps=100", "must be FIRST:LAST, e.g. 100:105, not '100'"),
        ("--profile_steps=5:4", "steps count from 1, and FIRST <= LAST"),
        ("--profile_steps=10:13", "--profile_steps=10:13: the run ends with step 12"),
        ("--seeds=0,0", "names a seed twice"),
        ("--seeds=0,4294967296", "must be a list of seeds such as 0,1,2, not '0,4294967296'"),
    ],
)
def test_a_mistake_is_one_line(tiny_arguments, tmp_path, flags, message, capsys):
    off = "--config.data.build_if_absent=False"
    arguments = tiny_arguments(tmp_path / "run", off, *flags.split())
    assert message in error_of("drl_jax.train", *arguments, capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_is_no_place_for_other_runs(finished, arguments, capsys):
    run, _ = finished
    before = (run / "config.json").read_text()
    for flag, message in (
        ("--config.optim.lr=0.5", "config.optim.lr was 0.0015, now 0.5"),
        ("--seeds=3", f"{run} holds a run, and --seeds makes a directory of runs"),
    ):
        assert message in error_of("drl_jax.train", *arguments(run, flag), capsys=capsys)
    assert (run / "config.json").read_text() == before


def test_too_little_memory_is_one_line(shapes_config):
    message = r"do not have enough memory \(.*RESOURCE_EXHAUSTED.*remat"
    with pytest.raises(TrainingError, match=message), _memory_errors(shapes_config):
        jnp.zeros(2**50, jnp.uint8).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError), _memory_errors(shapes_config):
        raise jax.errors.JaxRuntimeError("INTERNAL: another error")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=nowhere"], "no run in nowhere"),
        (["--checkpoint=5"], "no checkpoint of step 5"),
        (["--checkpoint=first"], "best, latest or a step"),
        (["--split=dev"], "no split 'dev'"),
        (["--data_dir=nowhere"], "no dataset in nowhere"),
    ],
)
def test_evaluation_mistakes_are_one_line(finished, flags, message, capsys):
    command = ("drl_jax.evaluate", f"--workdir={finished[0]}", *flags)
    assert message in error_of(*command, capsys=capsys)


# ---------------------------------------------------------------- several seeds


@pytest.fixture(scope="module")
def seeds(arguments, tmp_path_factory):
    """Runs of the seeds 0, which was killed in its second evaluation, and 1; and what the second
    start printed."""
    workdir = tmp_path_factory.mktemp("runs") / "seeds"
    evaluate, evaluated = Evaluator.run, []

    def killed_in_the_second(self, *arguments, **options):
        evaluated.append(1)
        if len(evaluated) == 2:
            raise SystemExit("killed")
        return evaluate(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "run", killed_in_the_second)
        with pytest.raises(SystemExit):
            train(arguments(workdir, "--seeds=0,1"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train(arguments(workdir, "--seeds=0,1")) == 0
    return workdir, printed.getvalue()


def test_a_run_that_was_killed_in_an_evaluation_repeats_only_that(seeds, finished):
    """The checkpoint is saved before, and TensorBoard shows everything once."""
    workdir, printed = seeds
    assert f"resuming {workdir / 'seed_0'} from step 12 of 12" in printed
    assert len(list((workdir / "seed_0").glob("events*"))) == 2
    assert_same_run(workdir / "seed_0", finished[0])


def test_each_seed_is_a_run(seeds):
    workdir, _ = seeds
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
    assert summary["card"]["seeds"] == [0, 1]
    assert len({run["card"]["parameters_sha256"] for run in summary["runs"]}) == 2


def test_finished_seeds_are_not_trained_again(seeds, arguments, capsys):
    workdir = seeds[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("seed_*/*")}
    written = (workdir / "seeds.json").read_text()
    assert train(arguments(workdir, "--seeds=0,1")) == 0
    printed = capsys.readouterr().out
    assert f"seed 1, 2 of 2: finished in {workdir / 'seed_1'}" in printed
    assert "seeds 0, 1" in printed
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("seed_*/*")} == before
    assert (workdir / "seeds.json").read_text() == written


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
