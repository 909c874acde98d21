"""Checkpoints and directories of runs: order of saving, the best one, whose they are."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from support.params import random_params
from support.runs import make_run

from drl_jax.config import LossConfig, OptimConfig
from drl_jax.evaluation.evaluator import Evaluator
from drl_jax.models.drl import abstract_params
from drl_jax.runs import train_run
from drl_jax.runs.checkpoint_files import CheckpointError
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.train_run import train
from drl_jax.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.state import TrainState, state_from_params


@pytest.fixture(scope="module")
def tx():
    return make_optimizer(OptimConfig(), 10)


@pytest.fixture(scope="module")
def state(tiny_model, tx):
    return state_from_params(random_params(tiny_model), tx, make_layout(jax.devices()[:1]))


def at_step(step: int) -> TrainState:
    """A state with one small parameter; checkpoints do not depend on the model."""
    replicated = make_layout(jax.devices()[:1]).replicated
    return jax.device_put(
        TrainState(np.int32(step), {"w": np.ones(3)}, {"m": np.ones(3)}), replicated
    )


def test_the_latest_and_the_best_checkpoints_are_kept(tmp_path):
    """A metric is attached after the save; the best checkpoint survives worse later ones."""
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        for step, value in ((1, 10.0), (2, 30.0), (3, 20.0), (4, float("nan")), (5, 20.0)):
            checkpoints.save(at_step(step))
            assert checkpoints.metric(step) is None
            checkpoints.attach_metric(step, value)
        checkpoints.save(at_step(6))
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
