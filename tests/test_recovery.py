"""What a run does with damaged and foreign files, values that are not finite, and its manifest."""

import contextlib
import json
import random
import re
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import TINY, error_of
from support.files import contents, flip_largest, refused
from support.finished_runs import assert_same_run, metrics
from support.params import random_params
from support.runs import make_run

from data_prep.build import main as build
from drl_jax.evaluate import main as evaluate
from drl_jax.models.tokenizers import CLIPTokenizer
from drl_jax.runs.checkpoint_files import CheckpointError, DamagedCheckpoint
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.run_params import restore_params
from drl_jax.runtime.files import seal
from drl_jax.runtime.sharding import make_layout
from drl_jax.train import main as train
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import abstract_state, state_from_params
from drl_jax.weights.containers import open_weights

# Orbax leaves tasks behind when it cannot read an array.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# In one training caption of the dataset below.
RARE_WORD = "zebra"


@pytest.fixture(scope="module")
def custom_data(test_videos, tmp_path_factory) -> Path:
    """A built dataset of 24 training, 4 val and 4 test videos."""
    directory = tmp_path_factory.mktemp("custom")
    videos = sorted(test_videos.glob("*.mp4"))
    splits = ["val"] * 4 + ["test"] * 4 + ["train"] * (len(videos) - 8)
    rows = [
        {"video": video.name, "caption": f"a clip of number {row}", "split": split}
        for row, (video, split) in enumerate(zip(videos, splits, strict=True))
    ]
    rows[-1]["caption"] = f"a {RARE_WORD} runs"
    annotations = directory / "captions.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["custom", f"--videos={test_videos}", f"--annotations={annotations}"]
    storage = ["--image_size=64", "--max_frames=4", "--storage=raw", f"--data_dir={directory}"]
    # As `shapes` is sampled.
    assert build([*command, *storage, "--frame_clock=frames", "--no-as_shown"]) == 0
    return directory


@pytest.fixture(scope="module")
def arguments(custom_data, tiny_weights):
    """Makes the arguments of a run of three epochs of 3 steps, which keeps all checkpoints."""

    def make(workdir, *extra):
        return (
            "--config=configs/shapes.py:smoke",
            f"--workdir={workdir}",
            "--config.data.dataset=custom",
            f"--config.data.data_dir={custom_data}",
            "--config.data.build_if_absent=False",
            "--config.train.batch_size=8",
            "--config.train.epochs=3",
            "--config.train.log_every=2",
            "--config.train.keep_checkpoints=3",
            *TINY,
            f"--config.model.init={tiny_weights}",
            *extra,
        )

    return make


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    """A run with the checkpoints 3, 6 and 9. Not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert train(arguments(workdir)) == 0
    return workdir


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def error_of_training(arguments, capsys):
    return lambda run, *flags: error_of("drl_jax.train", *arguments(run, *flags), capsys=capsys)


@pytest.fixture
def error_of_evaluation(capsys):
    return lambda run, *flags: error_of(
        "drl_jax.evaluate", f"--workdir={run}", *flags, capsys=capsys
    )


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
    # Files of arrays have random names; most bytes are in the largest one.
    files = sorted(
        (path for path in original.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    files = [path.relative_to(original) for path in files]
    needed = [Path("params/_METADATA"), Path("params/manifest.ocdbt"), files[-1]]
    cases = [(path, kind) for path in needed for kind in ("cut", "delete")]
    cases += [(files[-1], kind) for kind in ("empty", "zeros", *["flip"] * 5)]
    # Others, such as shardings, need not be.
    cases += [(rng.choice(files), kind) for kind in ("cut", "delete", "empty", "flip", "zeros")]
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
                assert path not in needed, f"{path} {kind}"
                for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"{path} {kind}")
        assert "\n" not in message
        assert len(message) < 300
        shutil.rmtree(run)


def test_a_resumed_run_falls_back_to_the_latest_intact_checkpoint(
    run, finished, arguments, error_of_training, error_of_evaluation, capsys
):
    """Also without its manifest, in another place, and with flags that results do not depend on."""
    run_id = json.loads((run / "manifest.json").read_text())["id"]
    # Parameters of another step.
    shutil.rmtree(run / "checkpoints" / "9" / "params")
    shutil.copytree(run / "checkpoints" / "6" / "params", run / "checkpoints" / "9" / "params")
    (run / "result.json").unlink()
    (run / "manifest.json").unlink()
    line = error_of_evaluation(run, "--checkpoint=9")
    assert "checkpoint 9 in " in line
    assert line.endswith(" differs from its checksum; intact: 3, 6")
    assert train(arguments(run, "--config.train.keep_checkpoints=4")) == 0
    printed = capsys.readouterr().out
    assert "checkpoint 9 is damaged: params/" in printed
    assert f"moved to {run / 'damaged_checkpoints'}" in printed
    assert f"resuming {run} from step 6 of 9" in printed
    assert_same_run(run, finished)
    assert len(list((run / "damaged_checkpoints").iterdir())) == 1
    assert json.loads((run / "manifest.json").read_text())["id"] == run_id

    for step in (run / "checkpoints").iterdir():
        flip_largest(step / "params")
    before = contents(run / "checkpoints")
    line = error_of_training(run)
    assert "no checkpoint in" in line
    assert "is intact" in line
    assert "they are kept: restore a backup, or train the run again in another" in line
    assert contents(run / "checkpoints") == before
    assert "no other one is intact" in error_of_evaluation(run)


def test_a_checkpoint_that_cannot_be_read_ends_the_run(run, error_of_training, error_of_evaluation):
    path = run / "checkpoints" / "9" / "params" / "manifest.ocdbt"
    before = contents(run / "checkpoints")
    with refused(path):
        for line in (error_of_training(run), error_of_evaluation(run, "--checkpoint=latest")):
            assert f"{path.parent} cannot be read: Too many levels of symbolic links" in line
            assert line.endswith(
                "nothing was moved or deleted, try again when the cause is removed"
            )
    assert contents(run / "checkpoints") == before
    assert not (run / "damaged_checkpoints").exists()


def test_a_damaged_metric_is_computed_again(run, arguments, error_of_evaluation, capsys):
    """By a resumed run, unless its checkpoint is damaged, too; evaluation chooses no other one."""
    path = run / "checkpoints" / "6" / "metrics.json"
    before = path.read_text()
    path.write_text(before.replace('"val_t2v_R1": ', '"val_t2v_R1": 9'))
    line = error_of_evaluation(run)
    assert f"{run / 'checkpoints'}: 6/metrics.json is damaged" in line
    assert "name a step instead of best: 3, 6, 9" in line
    (run / "checkpoints" / "3" / "metrics.json").write_text("{")
    flip_largest(run / "checkpoints" / "3" / "params")
    assert train(arguments(run)) == 0
    printed = capsys.readouterr().out
    assert "the metric of checkpoint 6 is damaged; evaluating it again" in printed
    assert "checkpoint 3 is damaged: params/" in printed
    assert path.read_text() == before
    assert json.loads((run / "result.json").read_text())["best_step"] in (6, 9)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.json", '"vision_heads": 2', '"vision_heads": 4', " was changed: config"),
        ("config.json", '"seed": 0', '"seed"\x00 0', " is not a configuration"),
        ("manifest.json", '"seed": 0', '"seed": 1', " is damaged, or not the manifest of a run"),
    ],
)
def test_changed_files_of_a_run_are_refused(
    run, error_of_training, error_of_evaluation, file, old, new, message
):
    text = (run / file).read_text()
    assert text.count(old) == 1
    (run / file).write_text(text.replace(old, new))
    assert file + message in error_of_evaluation(run)
    assert file + message in error_of_training(run)


def test_a_run_without_its_configuration_is_refused(run, error_of_training):
    (run / "config.json").unlink()
    assert "has manifest.json but no config.json" in error_of_training(run, "--config.seed=5")


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
        for _ in range(50):  # Opening is the part that meets a deletion most often.
            with Checkpoints(run, read_only=True) as checkpoints:
                checkpoints.find_step("best")
        for checkpoint in ("latest", "best") * 2:
            _, params = restore_params(run, config.model, layout, checkpoint)
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(saved.params), strict=True):
                np.testing.assert_array_equal(a, b)
        with contextlib.suppress(CheckpointError):
            restore_params(run, config.model, layout, "1")
    finally:
        stop.set()
        writer.join()


# ---------------------------------------------------------------- values that are not finite


def save_changed(state: dict[str, np.ndarray], path: Path, original: Path) -> None:
    """Saves other tensors with the configuration of a file of weights."""
    metadata = open_weights(original).metadata
    del metadata["drl_jax_crc32"]
    save_file(state, path, metadata=metadata)


def test_a_step_that_is_not_finite_is_named_and_can_be_skipped(
    arguments, tiny_weights, error_of_training, tmp_path, capsys
):
    """The weights overflow for a caption with the rare word: in one batch of each epoch."""
    run, weights = tmp_path / "run", tmp_path / "weights.safetensors"
    state = load_file(tiny_weights)
    ids, mask, _ = CLIPTokenizer().tokenize([RARE_WORD], 8)
    state["clip.token_embedding.weight"][ids[0][mask[0]][1:-1]] = 3e38
    save_changed(state, weights, tiny_weights)
    init = f"--config.model.init={weights}"
    line = error_of_training(run, init)
    step = int(line.split("step ")[1].split(":")[0])
    path = run / f"nonfinite_{step}.json"
    assert "the contrastive loss is not finite" in line
    assert f"its 8 examples are in {path}" in line
    assert "with config.train.skip_nonfinite=1" in line
    examples = json.loads(path.read_text())["examples"]
    assert [row["caption"] for row in examples].count(f"a {RARE_WORD} runs") == 1
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.steps() == [] or checkpoints.steps()[-1] < step

    line = error_of_training(run, init, "--config.train.skip_nonfinite=2")
    assert "with config.train.skip_nonfinite=3" in line
    assert train(arguments(run, init, "--config.train.skip_nonfinite=3")) == 0
    assert "left out, 3 of at most 3" in capsys.readouterr().out
    assert len(json.loads((run / "result.json").read_text())["skipped_steps"]) == 3
    # The squares of these weights are infinite in float32.
    overflowing = re.compile("train/(param|update)_norm")
    for line in metrics(run):
        assert all(np.isfinite(line[tag]) for tag in line if not overflowing.match(tag))


def test_weights_that_are_not_finite_are_refused(tiny_weights, error_of_training, tmp_path):
    state = load_file(tiny_weights)
    state["clip.ln_final.weight"][3] = np.nan
    path = tmp_path / "nan.safetensors"
    save_changed(state, path, tiny_weights)
    line = error_of_training(tmp_path / "run", f"--config.model.init={path}")
    assert "clip.ln_final.weight has values that are not finite; get the file again" in line


# ---------------------------------------------------------------- the run and its surroundings


def test_another_dataset_is_another_run(finished, error_of_training, shapes_data, tmp_path):
    (tmp_path / "custom").symlink_to(shapes_data / "shapes")
    line = error_of_training(finished, f"--config.data.data_dir={tmp_path}")
    assert "is not the one that the run in" in line
    assert "build it again from the same files, or start a new run" in line


@pytest.fixture(scope="module")
def manifest(finished):
    return json.loads((finished / "manifest.json").read_text())


def test_the_manifest_records_a_start(manifest):
    start = manifest["starts"][0]
    assert (start["first_step"], start["last_step"], start["outcome"]) == (0, 9, "finished")
    assert start["devices"] == {"kind": "cpu", "count": 8, "processes": 1}
    assert start["ended"] >= start["started"]
    assert start["versions"]["jax"] == jax.__version__
    assert len(manifest["dataset"]["content"]) == len(manifest["weights_sha256"]) == 64


@pytest.fixture(scope="module")
def reproduced(manifest, custom_data, tmp_path_factory):
    """Makes the arguments that start the run again elsewhere, from a changed manifest."""
    directory = tmp_path_factory.mktemp("reproduced")
    moved = directory / "moved"
    moved.symlink_to(custom_data)
    path = directory / "manifest.json"

    def make(workdir, change):
        changed = json.loads(json.dumps(manifest))
        del changed["sha256"]
        change(changed)
        path.write_text(json.dumps(seal(changed)))
        data = f"--config.data.data_dir={moved}"
        return (f"--reproduce={path}", data, f"--workdir={workdir}")

    return make


def test_the_manifest_reproduces_a_run(
    manifest, reproduced, finished, run, error_of_training, error_of_evaluation, tmp_path, capsys
):
    """Under another id: the checkpoints of one run are not those of the other."""
    again = tmp_path / "again"

    def change(manifest):
        manifest["starts"][0]["versions"]["optax"] = "0.0.1"

    assert train(reproduced(again, change)) == 0
    printed = capsys.readouterr().out
    assert "configuration, weights and dataset are the same" in printed
    assert "optax: 0.0.1 there, " in printed
    assert_same_run(again, finished)
    other = json.loads((again / "manifest.json").read_text())
    assert other["config_sha256"] == manifest["config_sha256"]

    shutil.rmtree(run / "checkpoints" / "9")
    shutil.copytree(again / "checkpoints" / "9", run / "checkpoints" / "9")
    before = contents(run / "checkpoints")
    message = f"it is of run {other['id'][:12]} (here {manifest['id'][:12]}); it is kept"
    assert message in error_of_training(run)
    assert message in error_of_evaluation(run, "--checkpoint=latest")
    assert message in error_of_evaluation(run)
    assert contents(run / "checkpoints") == before


def test_what_does_not_reproduce_a_run_is_refused(reproduced, tmp_path, capsys):
    def refusal(*flags, change=lambda manifest: None):
        arguments = reproduced(tmp_path / "run", change)
        return error_of("drl_jax.train", *arguments, *flags, capsys=capsys)

    assert "config.optim.lr is" in refusal("--config.optim.lr=0.5")
    line = refusal(change=lambda manifest: manifest.update(weights_sha256="0" * 64))
    assert "is not the file that the run started from" in line
    assert "--seeds goes with --config" in refusal("--seeds=3")
    path = tmp_path / "manifest.json"
    for content in (b"{}", b'{"config": "a"}', b"\xe9"):
        path.write_bytes(content)
        line = error_of("drl_jax.train", f"--reproduce={path}", capsys=capsys)
        assert "is not the manifest of a run" in line
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_cannot_be_written_prints_its_metrics(run, capsys):
    (run / "eval_val_9.json").mkdir()
    assert evaluate([f"--workdir={run}", "--split=val", "--checkpoint=latest"]) == 1
    captured = capsys.readouterr()
    assert "R@10" in captured.out
    (line,) = captured.err.splitlines()
    assert "the metrics are complete, but" in line
    assert "eval_val_9.json cannot be written: Is a directory (EISDIR)" in line
