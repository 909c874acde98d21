"""What a run does with damaged files, a full disk, a second training and values that are not
finite."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import ROOT, TINY, error_line, error_of, run_module
from support.files import contents, refused
from support.finished_runs import assert_same_run, metrics
from support.pairs import start_pair, wait_for
from support.params import random_params
from support.runs import make_run

from data_prep.build import main as build
from drl_jax.evaluate import main as evaluate
from drl_jax.models.tokenizers import CLIPTokenizer
from drl_jax.runs.checkpoint_files import CheckpointError, DamagedCheckpoint, write_metric
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.run_params import restore_params
from drl_jax.runtime.files import seal
from drl_jax.runtime.sharding import make_layout
from drl_jax.train import main as train
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import abstract_state, state_from_params
from drl_jax.weights.torch_file import read_metadata

# Orbax leaves tasks behind when it cannot read an array.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# In one training caption of the dataset below.
RARE_WORD = "zebra"
DATASET = (
    "--config=configs/shapes.py:smoke",
    "--config.data.dataset=custom",
    "--config.data.build_if_absent=False",
    "--config.train.batch_size=8",
    "--config.train.epochs=3",
    "--config.train.log_every=2",
    *TINY,
)


@pytest.fixture(scope="module")
def custom_data(test_videos, tmp_path_factory) -> Path:
    """A built dataset of 24 training, 4 val and 4 test videos."""
    directory = tmp_path_factory.mktemp("custom")
    build_custom(directory, sorted(test_videos.glob("*.mp4")))
    return directory


def build_custom(directory: Path, videos: list[Path], *flags: str) -> None:
    splits = ["val"] * 4 + ["test"] * 4 + ["train"] * (len(videos) - 8)
    rows = [
        {"video": video.name, "caption": f"a clip of number {row}", "split": split}
        for row, (video, split) in enumerate(zip(videos, splits, strict=True))
    ]
    rows[-1]["caption"] = f"a {RARE_WORD} runs"
    annotations = directory / "captions.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["custom", f"--videos={videos[0].parent}", f"--annotations={annotations}"]
    storage = ["--image_size=64", "--max_frames=4", "--storage=raw", f"--data_dir={directory}"]
    assert build([*command, *storage, *flags]) == 0


@pytest.fixture(scope="module")
def arguments(custom_data, tiny_weights):
    def make(workdir, *extra):
        return (
            *DATASET,
            f"--workdir={workdir}",
            f"--config.data.data_dir={custom_data}",
            f"--config.model.init={tiny_weights}",
            *extra,
        )

    return make


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    """A run with the checkpoints of epochs 2 and 3. Not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert train(arguments(workdir)) == 0
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.steps()[-2:] == [6, 9]
    return workdir


# ---------------------------------------------------------------- damaged checkpoints


def damage(path: Path, kind: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
        return
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        start = rng.randrange(len(content))
        content[start : start + 64] = bytes(len(content[start : start + 64]))
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2]}.get(kind, content))


@pytest.fixture(scope="module")
def model_run(shapes_config, tmp_path_factory):
    """A run of one checkpoint, its state in memory, and the shapes of the state."""
    workdir = tmp_path_factory.mktemp("model") / "run"
    config = make_run(workdir, shapes_config)
    tx, layout = make_optimizer(config.optim, 1), make_layout(jax.devices()[:1])
    state = state_from_params(random_params(config.model, seed=3, position_std=1.0), tx, layout)
    return workdir, config, state, abstract_state(config.model, tx, layout)


def test_damage_of_a_checkpoint_is_noticed(model_run, tmp_path):
    """No kind of damage to any file is read as if it were the checkpoint."""
    workdir, _, state, abstract = model_run
    rng = random.Random(0)
    original = workdir / "checkpoints" / "0"
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    # Most bytes are of arrays; every file has its turn.
    arrays = [path for path in files if (original / path).stat().st_size > 10_000]
    cases = [(path, kind) for path in files for kind in ("cut", "delete")]
    cases = rng.sample(cases, 12) + [(path, "empty") for path in arrays[:2]]
    cases += [(rng.choice(arrays), "flip") for _ in range(16)]
    cases += [(rng.choice(files), kind) for kind in ("flip", "flip", "flip", "zeros", "zeros")]
    noticed = 0
    run = tmp_path / "run"
    for path, kind in cases:
        shutil.copytree(workdir, run)
        damage(run / "checkpoints" / "0" / path, kind, rng)
        with Checkpoints(run, read_only=True) as checkpoints:
            try:
                restored, _ = checkpoints.restore_state(0, abstract)
            except DamagedCheckpoint as error:
                message = str(error)
            else:
                message = ""
                for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"{path} {kind}")
        assert "\n" not in message
        assert len(message) < 300
        noticed += bool(message)
        shutil.rmtree(run)
    # Some files, such as shardings, are not needed.
    assert noticed >= 10


def test_arrays_of_another_step_are_refused(finished, tmp_path):
    """Parameters put in place of others, and a checkpoint under another step."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    directory = run / "checkpoints"
    shutil.rmtree(directory / "9" / "params")
    shutil.copytree(directory / "6" / "params", directory / "9" / "params")
    line = error_of_evaluate(run, "--checkpoint=9")
    assert "checkpoint 9" in line
    assert "differs from its checksum; intact: " in line
    shutil.rmtree(directory / "9")
    shutil.copytree(directory / "6", directory / "9")
    assert "9 is not a checkpoint of this run and step: it is of step 6; it is kept" in (
        error_of_evaluate(run, "--checkpoint=9")
    )
    # In a process: Orbax's abandoned tasks print nothing either.
    damage(directory / "9" / "params" / "manifest.ocdbt", "cut", random.Random(0))
    damage(directory / "9" / "step" / "metadata", "delete", random.Random(0))
    finished = run_module("drl_jax.evaluate", f"--workdir={run}", "--checkpoint=9", check=False)
    assert "checkpoint 9" in error_line(finished)


@pytest.fixture(autouse=True)
def _capsys(capsys):
    error_of_evaluate.capsys = capsys


def error_of_evaluate(workdir: Path, *flags: str) -> str:
    return error_of(
        "drl_jax.evaluate", f"--workdir={workdir}", *flags, capsys=error_of_evaluate.capsys
    )


def flip_largest(checkpoint: Path) -> None:
    """Flips a bit of the parameters."""
    path = max((checkpoint / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_resumed_run_falls_back_to_the_latest_intact_checkpoint(
    finished, arguments, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flip_largest(run / "checkpoints" / "9")
    (run / "result.json").unlink()
    assert train(arguments(run)) == 0
    printed = capsys.readouterr().out
    assert "checkpoint 9 is damaged: params/" in printed
    assert f"moved to {run / 'damaged_checkpoints'}" in printed
    assert f"resuming {run} from step 6 of 9" in printed
    assert_same_run(run, finished)
    assert len(list((run / "damaged_checkpoints").iterdir())) == 1
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == 9

    for step in list((run / "checkpoints").iterdir()):
        flip_largest(step)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    line = error_of("drl_jax.train", *arguments(run), capsys=capsys)
    assert "no checkpoint in" in line
    assert "is intact" in line
    assert "they are kept: restore a backup, or train the run again with another" in line
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert "no other one is intact" in error_of_evaluate(run)


def test_a_checkpoint_that_cannot_be_read_ends_the_run(finished, arguments, tmp_path, capsys):
    """Status 1, and the same command goes on when the disk is well again."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "checkpoints" / "9" / "params" / "manifest.ocdbt"
    before = contents(run / "checkpoints")
    with refused(path):
        for line in (
            error_of("drl_jax.train", *arguments(run), capsys=capsys),
            error_of_evaluate(run, "--checkpoint=latest"),
        ):
            assert (
                f"{path.parent} cannot be read: Too many levels of symbolic links (ELOOP)" in line
            )
            assert line.endswith(
                "nothing was moved or deleted, try again when the cause is removed"
            )
    assert contents(run / "checkpoints") == before
    assert not (run / "damaged_checkpoints").exists()
    assert train(arguments(run)) == 0
    assert_same_run(run, finished)


def test_a_checkpoint_of_another_run_ends_the_run(finished, arguments, tmp_path, capsys):
    """Of the same configuration, dataset and step, and therefore of the same parameters. A run may
    be moved, and go on with other flags on which results do not depend."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, run)
    assert train(arguments(other)) == 0
    ids = [json.loads((path / "manifest.json").read_text())["id"] for path in (run, other)]
    assert len({*ids, ""}) == 3
    shutil.rmtree(run / "checkpoints" / "9")
    shutil.copytree(other / "checkpoints" / "9", run / "checkpoints" / "9")
    before = contents(run / "checkpoints")
    message = f"it is of run {ids[1][:12]} (here {ids[0][:12]}); it is kept"
    assert message in error_of("drl_jax.train", *arguments(run), capsys=capsys)
    assert message in error_of_evaluate(run, "--checkpoint=latest")
    assert message in error_of_evaluate(run)
    assert contents(run / "checkpoints") == before
    shutil.rmtree(run / "checkpoints" / "9")
    (run / "manifest.json").unlink()
    assert train(arguments(run, "--config.train.keep_checkpoints=3")) == 0
    assert json.loads((run / "manifest.json").read_text())["id"] == ids[0]


def test_a_damaged_metric_is_noticed(finished, arguments, tmp_path, capsys):
    """Evaluation does not choose another best checkpoint; a resumed run evaluates it again."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "checkpoints" / "6" / "metrics.json"
    before = path.read_text()
    path.write_text(before.replace('"val_t2v_R1": ', '"val_t2v_R1": 9'))
    line = error_of_evaluate(run)
    assert f"{run / 'checkpoints'}: 6/metrics.json is damaged" in line
    assert "name a step instead of best: " in line
    assert train(arguments(run)) == 0
    assert "the metric of checkpoint 6 is damaged; evaluating it again" in capsys.readouterr().out
    assert path.read_text() == before
    assert_same_run(run, finished)


@pytest.mark.parametrize("best_is_known", [True, False])
def test_a_finished_run_with_a_damaged_best_checkpoint_tests_the_next(
    finished, arguments, tmp_path, capsys, best_is_known
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    write_metric(run / "checkpoints" / "6", 99.0)
    flip_largest(run / "checkpoints" / "6")
    if not best_is_known:
        (run / "checkpoints" / "6" / "metrics.json").write_text("{")
    assert train(arguments(run)) == 0
    assert "checkpoint 6 is damaged: params/" in capsys.readouterr().out
    assert json.loads((run / "result.json").read_text())["best_step"] == 9


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "config.json",
            '"vision_heads": 2',
            '"vision_heads": 4',
            "config.json was changed: config",
        ),
        ("config.json", '"seed": 0', '"seed"\x00 0', "config.json is not a configuration"),
        ("manifest.json", '"seed": 0', '"seed": 1', "manifest.json is damaged"),
    ],
)
def test_changed_files_of_a_run_are_refused(
    finished, arguments, tmp_path, capsys, file, old, new, message
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = (run / file).read_text()
    assert text.count(old) == 1
    (run / file).write_text(text.replace(old, new))
    assert message in error_of_evaluate(run)
    assert message in error_of("drl_jax.train", *arguments(run), capsys=capsys)


def test_a_run_without_its_configuration_is_refused(finished, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.json").unlink()
    line = error_of("drl_jax.train", *arguments(run, "--config.seed=5"), capsys=capsys)
    assert "has manifest.json but no config.json" in line


def test_evaluation_while_checkpoints_are_replaced(model_run, tmp_path):
    """The names `best` and `latest` always give a checkpoint; a number may be gone, in one line."""
    workdir, config, state, _ = model_run
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    layout, stop = make_layout(jax.devices()[:1]), threading.Event()
    saved = jax.device_get(state)

    def save() -> None:
        with Checkpoints(run) as checkpoints:
            for step in range(1, 1000):
                counter = jax.device_put(np.int32(step), state.step.sharding)
                checkpoints.save(state._replace(step=counter))
                if stop.is_set():
                    return

    writer = threading.Thread(target=save)
    writer.start()
    try:
        for _ in range(100):  # Opening is the part that meets a deletion most often.
            with Checkpoints(run, read_only=True) as checkpoints:
                checkpoints.find_step("best")
        for checkpoint in ("latest", "best") * 4:
            _, params = restore_params(run, config.model, layout, checkpoint)
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(saved.params), strict=True):
                np.testing.assert_array_equal(a, b)
        with contextlib.suppress(CheckpointError):
            restore_params(run, config.model, layout, "1")
    finally:
        stop.set()
        writer.join()


def test_a_state_that_is_not_finite_is_not_saved(model_run, tmp_path):
    _, _, state, _ = model_run
    scale = state.params["backbone"]["logit_scale"]
    state.params["backbone"]["logit_scale"] = scale * np.nan
    try:
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(CheckpointError, match="params/backbone/logit_scale has values that are"),
        ):
            checkpoints.save(state)
        assert not list((tmp_path / "checkpoints").iterdir())
    finally:
        state.params["backbone"]["logit_scale"] = scale


# ---------------------------------------------------------------- values that are not finite


def save_changed(state: dict[str, np.ndarray], path: Path, original: Path) -> None:
    """Saves other tensors with the configuration of a file of weights."""
    metadata = read_metadata(original)
    del metadata["drl_jax_crc32"]
    save_file(state, path, metadata=metadata)


@pytest.fixture(scope="module")
def explosive_weights(tiny_weights, tmp_path_factory) -> Path:
    """Weights that are finite, but overflow for a caption with the rare word."""
    path = tmp_path_factory.mktemp("weights") / "explosive.safetensors"
    state = load_file(tiny_weights)
    ids, mask, _ = CLIPTokenizer().tokenize([RARE_WORD], 8)
    state["clip.token_embedding.weight"][ids[0][mask[0]][1:-1]] = 3e38
    save_changed(state, path, tiny_weights)
    return path


def test_a_step_that_is_not_finite_is_named_and_can_be_skipped(
    arguments, explosive_weights, tmp_path, capsys
):
    run = tmp_path / "run"
    flags = arguments(
        run, f"--config.model.init={explosive_weights}", "--config.train.checkpoint_every=1"
    )
    line = error_of("drl_jax.train", *flags, capsys=capsys)
    step = int(line.split("step ")[1].split(":")[0])
    path = run / f"nonfinite_{step}.json"
    assert "the contrastive loss is not finite" in line
    assert f"its 8 examples are in {path}" in line
    assert "--config.train.skip_nonfinite=1" in line
    examples = json.loads(path.read_text())["examples"]
    assert [row["caption"] for row in examples].count(f"a {RARE_WORD} runs") == 1
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.steps() == [] or checkpoints.steps()[-1] < step

    # One batch of each of three epochs has the example.
    line = error_of("drl_jax.train", *flags, "--config.train.skip_nonfinite=2", capsys=capsys)
    assert "--config.train.skip_nonfinite=3" in line
    assert train([*flags, "--config.train.skip_nonfinite=3"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert len(result["skipped_steps"]) == 3
    # The squares of these weights are infinite in float32.
    overflowing = re.compile("train/(param|update)_norm")
    for line in metrics(run):
        assert all(np.isfinite(line[tag]) for tag in line if not overflowing.match(tag))

    whole = tmp_path / "whole"
    flags = [flag.replace(str(run), str(whole)) for flag in flags]
    assert train([*flags, "--config.train.skip_nonfinite=3"]) == 0
    assert "left out, 3 of at most 3" in capsys.readouterr().out
    assert_same_run(run, whole)


def test_weights_that_are_not_finite_are_refused(arguments, tiny_weights, tmp_path, capsys):
    state = load_file(tiny_weights)
    state["clip.ln_final.weight"][3] = np.nan
    path = tmp_path / "nan.safetensors"
    save_changed(state, path, tiny_weights)
    flags = arguments(tmp_path / "run", f"--config.model.init={path}")
    line = error_of("drl_jax.train", *flags, capsys=capsys)
    assert "clip.ln_final.weight has values that are not finite; get the file again" in line


# ---------------------------------------------------------------- the run and its surroundings


def test_a_rebuilt_dataset_is_another_run(finished, arguments, test_videos, tmp_path, capsys):
    build_custom(tmp_path, sorted(test_videos.glob("*.mp4"))[:-1])
    flags = arguments(finished, f"--config.data.data_dir={tmp_path}")
    line = error_of("drl_jax.train", *flags, capsys=capsys)
    assert "is not the one that the run in" in line
    assert "build it again from the same files, or start a new run" in line


def test_the_manifest_reproduces_a_run(finished, custom_data, tmp_path, capsys):
    manifest = json.loads((finished / "manifest.json").read_text())
    last_start = manifest["starts"][0]
    assert (last_start["first_step"], last_start["last_step"], last_start["outcome"]) == (
        0,
        9,
        "finished",
    )
    assert last_start["devices"] == {"kind": "cpu", "count": 8, "processes": 1}
    assert last_start["ended"] >= last_start["started"]
    assert last_start["versions"]["jax"] == jax.__version__
    assert len(manifest["dataset"]["content"]) == len(manifest["weights_sha256"]) == 64

    # Elsewhere, with another version.
    manifest["starts"][0]["versions"]["optax"] = "0.0.1"
    path = tmp_path / "copied" / "manifest.json"
    path.parent.mkdir()
    del manifest["sha256"]
    path.write_text(json.dumps(seal(manifest)))
    moved = tmp_path / "moved"
    moved.symlink_to(custom_data)
    flags = (f"--reproduce={path}", f"--config.data.data_dir={moved}")
    assert train([*flags, f"--workdir={tmp_path / 'again'}"]) == 0
    printed = capsys.readouterr().out
    assert "configuration, weights and dataset are the same" in printed
    assert "optax: 0.0.1 there, " in printed
    assert_same_run(tmp_path / "again", finished)
    again = json.loads((tmp_path / "again" / "manifest.json").read_text())
    assert (again["id"] != manifest["id"], again["config_sha256"]) == (
        True,
        manifest["config_sha256"],
    )

    other = (*flags, f"--workdir={tmp_path / 'other'}")
    line = error_of("drl_jax.train", *other, "--config.optim.lr=0.5", capsys=capsys)
    assert "config.optim.lr is" in line
    manifest["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(seal(manifest)))
    line = error_of("drl_jax.train", *other, capsys=capsys)
    assert "is not the file that the run started from" in line
    for content in ("{}", "[]", '{"config": "a"}', "\udce9"):
        path.write_bytes(content.encode(errors="surrogateescape"))
        assert "is not the manifest of a run" in error_of("drl_jax.train", *other, capsys=capsys)
    assert not (tmp_path / "other").exists()


def test_a_damaged_manifest_is_one_line(finished, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "manifest.json").write_text('{"starts": []}')
    line = error_of("drl_jax.train", *arguments(run), capsys=capsys)
    assert "manifest.json is damaged, or not the manifest of a run" in line
    (run / "manifest.json").unlink()
    assert train(arguments(run)) == 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.optim.lr=1e30", "config.optim.lr=1e+30 is above 1"),
        ("--config.optim.lr=nan", "config.optim.lr must be a finite number, not nan"),
        ("--config.optim.eps=inf", "config.optim.eps must be a finite number, not inf"),
        ("--config.optim.b1=1.5", "config.optim.b1 must be in [0, 1), not 1.5"),
        ("--config.optim.b2=1.0", "config.optim.b2 must be in [0, 1), not 1"),
        ("--config.optim.weight_decay=-5.0", "config.optim.weight_decay=-5 must be 0 or positive"),
        ("--config.seed=-1", "config.seed must be in [0, 2^32), not -1"),
        ("--config.train.skip_nonfinite=-1", "config.train.skip_nonfinite must be 0"),
        ("--config.train.epoch=1", "config.train has no field 'epoch' (did you mean epochs?)"),
        ("--config.seed.x=1", "--config.seed.x: config.seed is a value, not a group of fields"),
        ("--reproduce=nowhere.json", "not allowed with argument --config"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, tmp_path, flag, message, capsys):
    flags = arguments(tmp_path / "run", flag)
    assert message in error_of("drl_jax.train", *flags, capsys=capsys)
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def small_disk(path: Path, size: str):
    """A file system of a few MB."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_keeps_the_checkpoints_before(finished, arguments, tmp_path, capsys):
    """One line; with more space, the same command ends as an undisturbed run."""
    disk = tmp_path / "disk"
    with small_disk(disk, "9m"):
        flags = arguments(disk / "run", "--config.train.keep_checkpoints=9")
        line = error_of("drl_jax.train", *flags, capsys=capsys)
        assert "No space left on device" in line
        assert f"{disk / 'run'}" in line
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert train(flags) == 0
        assert f"resuming {disk / 'run'} from step 3" in capsys.readouterr().out
        assert_same_run(disk / "run", finished)


def test_evaluation_on_a_full_disk_prints_its_metrics(finished, tmp_path, capsys):
    disk = tmp_path / "disk"
    with small_disk(disk, "40m"):
        shutil.copytree(finished, disk / "run")
        # No block stays, also for what ends in one that is partly filled.
        with contextlib.suppress(OSError), (disk / "rest").open("wb", buffering=0) as rest:
            while True:
                rest.write(bytes(4096))
        before = sorted((disk / "run").iterdir())
        assert evaluate([f"--workdir={disk / 'run'}"]) == 1
        assert sorted((disk / "run").iterdir()) == before
    captured = capsys.readouterr()
    assert "R@10" in captured.out
    assert "the metrics are complete, but" in captured.err
    assert "No space left on device" in captured.err
    assert "Traceback" not in captured.err


def test_evaluation_of_a_read_only_run(finished, tmp_path, capsys):
    if os.geteuid():
        pytest.skip("cannot mount")
    mounted = tmp_path / "run"
    mounted.mkdir()
    subprocess.run(["mount", "--bind", finished, mounted], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", mounted], check=True)
        assert evaluate([f"--workdir={mounted}"]) == 1
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)
    captured = capsys.readouterr()
    assert "R@10" in captured.out
    assert "the metrics are complete, but" in captured.err
    assert "Read-only file system" in captured.err
    assert "Traceback" not in captured.err


# ---------------------------------------------------------------- processes and signals


def start(flags) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "drl_jax.train", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_second_training_is_refused_and_sighup_stops_the_first(arguments, tmp_path):
    """Both in one test: a process takes seconds to start."""
    run = tmp_path / "run"
    flags = arguments(run, "--config.train.epochs=2000", "--config.train.checkpoint_every=0")
    # Under nohup, a training would ignore SIGHUP.
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    first = start(flags)
    signal.signal(signal.SIGHUP, previous)
    try:
        wait_until((run / "metrics.jsonl").exists, first)
        second = run_module("drl_jax.train", *flags, check=False)
        assert f"the run in {run} is in use by process {first.pid} on host" in error_line(second)
        assert second.returncode == 1
        first.send_signal(signal.SIGHUP)
        _, errors = first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode == 75
    assert "SIGHUP: stopping after the next checkpoint" in errors
    assert "rerun the command to resume" in errors
    last_start = json.loads((run / "manifest.json").read_text())["starts"][-1]
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == last_start["last_step"] > 0
    assert last_start["outcome"].startswith("Interrupted: stopped after step")


def test_a_directory_that_is_removed_meanwhile_is_one_line(arguments, tmp_path):
    run = tmp_path / "run"
    process = start(arguments(run, "--config.train.epochs=2000"))
    try:
        wait_until((run / "checkpoints" / "3").exists, process)
        run.rename(tmp_path / "elsewhere")
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "No such file or directory" in errors.splitlines()[-1]


def test_a_build_ends_when_its_training_is_killed(tmp_path):
    flags = ("--config=configs/shapes.py", f"--config.data.data_dir={tmp_path / 'data'}")
    process = start((*flags, f"--workdir={tmp_path / 'run'}"))
    try:
        wait_until((tmp_path / "data" / "source").exists, process)
        (child,) = children(process.pid)
        process.kill()
        process.communicate(timeout=60)
        wait_until(lambda: not Path(f"/proc/{child}").exists())
    finally:
        process.kill()


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_two_processes_decide_alike(arguments, explosive_weights, tmp_path):
    """One of them reads a damaged file of the latest checkpoint; both fall back. Both skip the same
    step. A second pair is refused."""
    if os.geteuid():
        pytest.skip("cannot mount")
    run = tmp_path / "run"
    flags = arguments(
        run, f"--config.model.init={explosive_weights}", "--config.train.skip_nonfinite=3"
    )
    assert train(flags) == 0
    whole = metrics(run)
    arrays = run / "checkpoints" / "9" / "params"
    path = max(arrays.rglob("*"), key=lambda path: path.stat().st_size)
    shutil.copytree(run / "checkpoints" / "9", tmp_path / "9")
    flip_largest(tmp_path / "9")
    damaged = tmp_path / "9" / "params" / path.relative_to(arrays)
    # Only process 1 sees the other file.
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", script, "sh", str(damaged), str(path))
    (run / ".lock").unlink()
    pair = start_pair(flags, prefix_of_second=prefix)
    wait_until(lambda: (run / ".lock").exists() and (run / ".lock").stat().st_size, pair[0])
    second = start_pair(flags)
    for process in second:
        _, errors = wait_for(process)
        assert process.returncode == 1
        assert f"is in use by process {pair[0].pid} on host" in errors
        assert "Traceback" not in errors
    (printed, errors), (_, other_errors) = map(wait_for, pair)
    assert [process.returncode for process in pair] == [0, 0], (errors, other_errors)
    assert "checkpoint 9 is damaged: params/" in printed
    assert "(process 1); moved to" in printed
    assert f"resuming {run} from step 6 of 9" in printed
    assert metrics(run) == [pytest.approx(line, rel=1e-4, abs=1e-6) for line in whole]
    assert len(json.loads((run / "result.json").read_text())["skipped_steps"]) == 3


def test_two_processes_end_together(arguments, tmp_path):
    """A full disk, which one of them may notice alone."""
    disk = tmp_path / "disk"
    with small_disk(disk, "9m"):
        pair = start_pair(arguments(disk / "run", "--config.train.keep_checkpoints=9"))
        for process in pair:
            _, errors = wait_for(process)
            assert process.returncode == 1
            assert "Traceback" not in errors
            assert "No space left on device" in errors.strip().splitlines()[-1]
