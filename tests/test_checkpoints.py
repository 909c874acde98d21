"""Checkpoints and directories of runs: order of saving, the best one, whose they are."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import threading
import tracemalloc  # noqa: F401 (pytest imports it when it reports what Orbax leaves behind)

import jax
import numpy as np
import pytest
from support.files import contents, refused
from support.runs import make_run

from drl_jax.config import Config, LossConfig
from drl_jax.evaluation.evaluator import Evaluator
from drl_jax.models.drl import abstract_params
from drl_jax.runs import train_run
from drl_jax.runs.checkpoint_files import CheckpointError, read_info
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.train_run import train
from drl_jax.runs.workdir import (
    MANIFEST_FILE,
    Identity,
    WorkdirError,
    claim_workdir,
    identity_of,
    load_config,
)
from drl_jax.runtime.errors import Unavailable
from drl_jax.runtime.files import seal
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.train_step import TrainState


def at_step(step: int) -> TrainState:
    """A state with one small parameter; checkpoints do not depend on the model."""
    replicated = make_layout(jax.devices()[:1]).replicated
    return jax.device_put(
        TrainState(np.int32(step), {"w": np.full(3, step)}, {"m": np.ones(3)}), replicated
    )


def write_steps(workdir, *steps: int, **options) -> None:
    """Checkpoints whose metric is their step."""
    with Checkpoints(workdir, keep_latest=9, **options) as checkpoints:
        for step in steps:
            checkpoints.save(at_step(step))
            checkpoints.attach_metric(step, step)


def test_the_latest_and_the_best_checkpoints_are_kept(tmp_path):
    """A metric is attached after the save; the best checkpoint survives worse later ones."""
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        for step, value in ((1, 10.0), (2, 30.0), (3, 20.0), (4, float("nan")), (5, 20.0)):
            checkpoints.save(at_step(step))
            assert checkpoints.metric(step) is None
            checkpoints.attach_metric(step, value)
        checkpoints.save(at_step(6))
        checkpoints.wait()
        assert checkpoints.find_step("best") == 2
        assert checkpoints.find_step("latest") == 6
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.best_step() == 2
        assert checkpoints.metric(6) is None


def test_a_run_that_was_moved_away_is_not_made_anew(tmp_path):
    """A training whose directory comes back, without its configuration, would go on for hours."""
    run = tmp_path / "run"
    with Checkpoints(run) as checkpoints:
        checkpoints.save(at_step(1))
        checkpoints.wait()
        run.rename(tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError):
            checkpoints.attach_metric(1, 5.0)
        assert not run.exists()


def test_of_equally_good_checkpoints_the_latest_is_best(tmp_path):
    with Checkpoints(tmp_path, keep_latest=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(at_step(step))
            checkpoints.attach_metric(step, 5.0)
        assert checkpoints.best_step() == 2


def test_a_run_that_is_killed_in_an_evaluation_evaluates_again(
    shapes_config, tmp_path, monkeypatch
):
    """The checkpoint of the epoch is saved before its evaluation; resuming repeats only that."""
    config = dataclasses.replace(
        shapes_config,
        model=dataclasses.replace(shapes_config.model, interaction="dp", agg_module="none"),
        loss=LossConfig(cdcr=0),
        train=dataclasses.replace(shapes_config.train, batch_size=96, log_every=1),
    )
    workdir = tmp_path / "run"
    evaluate = Evaluator.run

    def killed(self, params, split, **options):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "run", killed)
        with pytest.raises(SystemExit):
            train(config, workdir)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2]
        assert checkpoints.best_step() is None

    def no_step(*arguments, **options):
        return None

    evaluations = []

    def counted(self, params, split, **options):
        evaluations.append(len(split.videos))
        return evaluate(self, params, split, **options)

    monkeypatch.setattr(train_run, "make_train_step", no_step)
    monkeypatch.setattr(Evaluator, "run", counted)
    result = train(config, workdir)
    assert result["best_step"] == result["total_steps"] == 2
    assert len(evaluations) == 3  # val of the epoch, then test and val of the best
    tags = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in tags if "eval/t2v_R1" in entry] == [2]
    assert [entry["step"] for entry in tags if "train/loss" in entry] == [1, 2]


def test_a_checkpoint_of_another_model_is_one_line(shapes_config, tmp_path):
    config = make_run(tmp_path / "run", shapes_config)
    other = dataclasses.replace(config.model, temporal_layers=1)
    with (
        Checkpoints(tmp_path / "run", read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"is of another model: temporal/.* there and .* here"),
    ):
        checkpoints.restore_params(0, abstract_params(other, make_layout()))


# ---------------------------------------------------------------- refusals


# Of a run whose manifest was read.
OWN = Identity("a" * 32, "b" * 64, "c" * 64)


def restore_latest(workdir, identity: Identity = OWN) -> int:
    with Checkpoints(workdir, identity=identity) as checkpoints:
        restored, _ = checkpoints.restore_latest(at_step(0))
        assert int(restored.params["w"][0]) == int(restored.step)
        return int(restored.step)


def restore_best(workdir) -> int:
    with Checkpoints(workdir, identity=OWN) as checkpoints:
        return checkpoints.restore_best(at_step(0).params)[0]


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("step/metadata", (restore_latest, restore_best)),
        ("step", (restore_latest, restore_best)),
        (".", (restore_latest, restore_best)),
        # Orbax takes what it may not look at for absent.
        ("params", (restore_latest, restore_best)),
        ("params/manifest.ocdbt", (restore_latest, restore_best)),
        ("params/d/*", (restore_latest, restore_best)),
        ("opt_state/manifest.ocdbt", (restore_latest,)),
        ("metrics.json", (restore_best,)),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_not_replaced_by_an_earlier_one(
    name, readers, tmp_path
):
    run = tmp_path / "run"
    write_steps(run, 1, 2, identity=OWN)
    before = contents(run)
    latest = run / "checkpoints" / "2"
    with refused(latest if name == "." else next(latest.glob(name))):
        for read in readers:
            with pytest.raises(
                Unavailable, match=r"2.* cannot be .*: Too many levels .*\(ELOOP\);"
            ):
                read(run)
    assert contents(run) == before
    assert restore_latest(run) == restore_best(run) == 2


# Orbax leaves tasks behind when it cannot read an array.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_running_out_of_file_descriptors_is_no_damage(tmp_path):
    write_steps(tmp_path, 1, 2, identity=OWN)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    refusals = 0
    with Checkpoints(tmp_path, identity=OWN) as checkpoints:
        checkpoints.restore_latest(at_step(0))
        free = os.dup(0)
        os.close(free)
        for left in range(12):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, limits[1]))
            try:
                assert int(checkpoints.restore_latest(at_step(0))[0].step) == 2
            except Unavailable as error:
                refusals += "EMFILE" in str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert refusals > 3
    assert contents(tmp_path) == before


def test_no_checkpoint_is_deleted_while_a_metric_cannot_be_read(tmp_path):
    """That of the best checkpoint, which would be deleted."""
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        checkpoints.save(at_step(1))
        checkpoints.attach_metric(1, 9.0)
        with refused(tmp_path / "checkpoints" / "1" / "metrics.json"):
            for step in (2, 3):
                checkpoints.save(at_step(step))
                checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3]
        checkpoints.save(at_step(4))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 4]


def test_a_checkpoint_that_cannot_be_written_names_the_error(tmp_path):
    """A limit of the size of files fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_steps(tmp_path, 1, identity=OWN)

    def save() -> None:
        with Checkpoints(tmp_path, identity=OWN) as checkpoints:
            checkpoints.save(at_step(2))

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(Unavailable, match=r"checkpoints.* cannot be .*: .*\(EFBIG\); nothing"):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert restore_latest(tmp_path) == 1


def test_a_checkpoint_whose_directory_cannot_be_created_leaves_no_thread(tmp_path, monkeypatch):
    """One that waits for the directory would keep the process for five minutes."""
    makedirs = os.makedirs

    def full(path, *arguments, **options):
        if "orbax-checkpoint-tmp" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        makedirs(path, *arguments, **options)

    monkeypatch.setattr(os, "makedirs", full)
    before = set(threading.enumerate())
    with pytest.raises(Unavailable, match=r"cannot be saved: .*\(ENOSPC\); nothing"):
        write_steps(tmp_path, 1, identity=OWN)
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in left if not name.startswith("asyncio")]


# ---------------------------------------------------------------- whose a checkpoint is


def assert_refused(run, step: int, config: Config, message: str) -> None:
    """A stranger is one line and stays where it is, whatever asks for it."""
    write_manifest(run, OWN, config)
    before = contents(run)
    with Checkpoints(run, read_only=True) as checkpoints:
        for read in (
            checkpoints.best_step,
            lambda: checkpoints.find_step("best"),
            lambda: checkpoints.restore_params(step, at_step(0).params),
        ):
            with pytest.raises(CheckpointError, match=message):
                read()
    with (
        Checkpoints(run, identity=identity_of(run)) as checkpoints,
        pytest.raises(CheckpointError, match=message),
    ):
        checkpoints.restore_latest(at_step(0))
    assert contents(run) == before


def write_manifest(workdir, identity: Identity, config: Config) -> None:
    """The part of a manifest that says whose the checkpoints are."""
    values = {
        "format": 2,
        "id": identity.run,
        "config_sha256": identity.config,
        "dataset": {"content": identity.dataset},
        "config": dataclasses.asdict(config),
        "starts": [{}],
    }
    (workdir / MANIFEST_FILE).write_text(json.dumps(seal(values)))


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("other", ["run", "config", "dataset"])
def test_a_checkpoint_of_another_run_is_refused(other, step, shapes_config, tmp_path):
    """Also an earlier one than the latest, which a later save would delete."""
    for name, identity in (("own", OWN), ("other", OWN._replace(**{other: "d" * 32}))):
        write_steps(tmp_path / name, 1, 2, 3, identity=identity)
    run = tmp_path / "own"
    shutil.rmtree(run / "checkpoints" / str(step))
    place = run / "checkpoints" / str(step)
    shutil.copytree(tmp_path / "other" / "checkpoints" / str(step), place)
    message = rf"{place} is not a checkpoint of this run and step: it is of {other} d{{12}} \(here"
    assert_refused(run, step, shapes_config, message)
    shutil.rmtree(place)
    assert restore_latest(run) == (3 if step == 1 else 2)


def test_a_checkpoint_of_another_step_is_refused(shapes_config, tmp_path):
    write_steps(tmp_path, 1, 2, identity=OWN)
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "7")
    message = "checkpoints/7 is not a checkpoint of this run and step: it is of step 1; it is kept"
    assert_refused(tmp_path, 7, shapes_config, message)


def test_a_metric_of_another_checkpoint_is_refused(tmp_path):
    """Swapped within a run; or of a copy of the run that went on in another way."""
    run = tmp_path / "run"
    write_steps(run, 1, 2)
    one, other = (run / "checkpoints" / step / "metrics.json" for step in "12")
    texts = one.read_text(), other.read_text()
    one.write_text(texts[1])
    other.write_text(texts[0])
    before = contents(run)
    with Checkpoints(run) as checkpoints:
        for read in (checkpoints.best_step, checkpoints.with_damaged_metric):
            with pytest.raises(CheckpointError, match=r"1/metrics.json is .*another .*\(step 2"):
                read()
    assert contents(run) == before
    one.write_text(texts[0])
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "2")
    with Checkpoints(copy, keep_latest=9) as checkpoints:
        checkpoints.save(at_step(1)._replace(step=at_step(2).step))
        checkpoints.attach_metric(2, 9.0)
    shutil.copy(copy / "checkpoints" / "2" / "metrics.json", other)
    with (
        Checkpoints(run) as checkpoints,
        pytest.raises(CheckpointError, match=r"2/metrics.json is .*another checkpoint \(params"),
    ):
        checkpoints.best_step()
    other.write_text(texts[1])
    with Checkpoints(run) as checkpoints:
        assert checkpoints.best_step() == 2


def test_a_run_without_a_manifest_has_the_id_of_its_checkpoints(tmp_path):
    write_steps(tmp_path / "run", 1)
    run = read_info(tmp_path / "run" / "checkpoints" / "1")["run"]
    assert len(run) == 32
    write_steps(tmp_path / "run", 2)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    for options in ({}, {"read_only": True}, {"identity": Identity(config="e" * 64)}):
        with Checkpoints(moved, **options) as checkpoints:
            assert checkpoints.identity.run == run
            assert checkpoints.best_step() == 2
    write_steps(tmp_path / "other", 3)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "3", moved / "checkpoints" / "3")
    with pytest.raises(CheckpointError, match=r"of several runs .*, and no manifest"):
        Checkpoints(moved)


def test_a_run_of_an_earlier_version_is_one_line(shapes_config, tmp_path):
    """It says how the run is made again."""
    run = tmp_path / "run"
    claim_workdir(run, shapes_config)
    write_manifest(run, OWN, shapes_config)
    values = json.loads((run / MANIFEST_FILE).read_text())
    for name in ("sha256", "format", "id", "config_sha256"):
        del values[name]
    (run / MANIFEST_FILE).write_text(json.dumps(seal(values)))
    for read in (load_config, identity_of):
        with pytest.raises(WorkdirError, match=r"format 1, .*--reproduce=.*manifest.json"):
            read(run)
    write_steps(tmp_path / "old", 1)
    path = tmp_path / "old" / "checkpoints" / "1" / "step" / "metadata"
    values = json.loads(path.read_text())
    for name in ("sha256", "format", *Identity._fields):
        del values[name]
    path.write_text(json.dumps(seal(values)))
    for options in ({}, {"identity": OWN}):
        with pytest.raises(CheckpointError, match=r"is of another version \(format 1"):
            Checkpoints(tmp_path / "old", **options).restore_latest(at_step(0))
