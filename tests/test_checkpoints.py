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
from support.files import contents, limit, refused

from drl_jax.config import Config
from drl_jax.runs.checkpoint_files import CheckpointError, read_info
from drl_jax.runs.checkpoints import Checkpoints
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


def test_the_latest_and_the_best_checkpoints_are_kept(tmp_path):
    """The best one survives worse later ones; of equally good ones, the latest is best."""
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        values = enumerate((30.0, 30.0, 20.0, float("nan"), 20.0), start=1)
        for step, value in values:
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


def test_a_damaged_best_checkpoint_is_replaced_by_the_next(tmp_path, capsys):
    write_steps(tmp_path, 1, 2, identity=OWN)
    (path,) = (tmp_path / "checkpoints" / "2" / "params").glob("d/*")
    path.write_bytes(bytes(path.stat().st_size))
    assert restore_best(tmp_path) == 1
    assert "checkpoint 2 is damaged: " in capsys.readouterr().out
    assert len(list((tmp_path / "damaged_checkpoints").iterdir())) == 1


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    state = at_step(1)._replace(params={"w": at_step(1).params["w"] * np.nan})
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="params/w has values that are not finite"),
    ):
        checkpoints.save(state)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_checkpoint_of_another_model_is_one_line(tmp_path):
    write_steps(tmp_path, 1)
    other = {"w": at_step(1).params["w"][:2]}
    with (
        Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"is of another model: w is \(3,\) there and \(2,\)"),
    ):
        checkpoints.restore_params(1, other)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("step/metadata", (restore_latest, restore_best)),
        (".", (restore_latest, restore_best)),
        # Orbax takes what it may not look at for absent.
        ("params", (restore_latest, restore_best)),
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
    refusals = 0
    with Checkpoints(tmp_path, identity=OWN) as checkpoints:
        checkpoints.restore_latest(at_step(0))
        free = os.dup(0)
        os.close(free)
        for left in range(12):
            with limit(resource.RLIMIT_NOFILE, free + left):
                try:
                    assert int(checkpoints.restore_latest(at_step(0))[0].step) == 2
                except Unavailable as error:
                    refusals += "EMFILE" in str(error)
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
    write_steps(tmp_path, 1, identity=OWN)

    def save() -> None:
        with Checkpoints(tmp_path, identity=OWN) as checkpoints:
            checkpoints.save(at_step(2))

    with (
        limit(resource.RLIMIT_FSIZE, 0),
        pytest.raises(Unavailable, match=r"checkpoints.* cannot be .*: .*\(EFBIG\); nothing"),
    ):
        save()
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


@pytest.mark.parametrize(
    ("step", "other"), [(1, "run"), (3, "run"), (3, "config"), (3, "dataset"), (7, "step")]
)
def test_a_checkpoint_of_another_run_or_step_is_refused(other, step, shapes_config, tmp_path):
    """Whatever asks for it; also an earlier one, which a later save would delete."""
    run, place = tmp_path / "own", tmp_path / "own" / "checkpoints" / str(step)
    write_steps(run, 1, 2, 3, identity=OWN)
    if other == "step":
        (run / "checkpoints" / "3").rename(place)
        found = "step 3;"
    else:
        write_steps(tmp_path / "other", 1, 2, 3, identity=OWN._replace(**{other: "d" * 32}))
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "other" / "checkpoints" / str(step), place)
        found = rf"{other} d{{12}} \(here"
    message = rf"{place} is not a checkpoint of this run and step: it is of {found}"
    write_manifest(run, OWN, shapes_config)
    before = contents(run)
    with Checkpoints(run, identity=identity_of(run)) as checkpoints:
        for read in (
            checkpoints.best_step,
            lambda: checkpoints.find_step("best"),
            lambda: checkpoints.restore_params(step, at_step(0).params),
            lambda: checkpoints.restore_latest(at_step(0)),
        ):
            with pytest.raises(CheckpointError, match=message):
                read()
    assert contents(run) == before
    shutil.rmtree(place)
    assert restore_latest(run) == (3 if step == 1 else 2)


def test_a_metric_of_another_checkpoint_is_refused(tmp_path):
    """Of another step, or of this step of a copy of the run that went on in another way."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    write_steps(run, 1, 2)
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "2")
    with Checkpoints(copy, keep_latest=9) as checkpoints:
        checkpoints.save(at_step(1)._replace(step=at_step(2).step))
        checkpoints.attach_metric(2, 9.0)
    path = run / "checkpoints" / "2" / "metrics.json"
    own = path.read_text()
    for source, step, reason in ((run, "1", "step 1"), (copy, "2", "params")):
        shutil.copy(source / "checkpoints" / step / "metrics.json", path)
        before = contents(run)
        with Checkpoints(run) as checkpoints:
            for read in (checkpoints.best_step, checkpoints.with_damaged_metric):
                match = rf"2/metrics.json is .*another checkpoint .*{reason}"
                with pytest.raises(CheckpointError, match=match):
                    read()
        assert contents(run) == before
        path.write_text(own)
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
