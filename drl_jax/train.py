"""Trains DRL on a built dataset.

    python -m drl_jax.train --config=configs/shapes.py [--workdir=DIR] [--config.optim.lr=3e-4]

Running the command again resumes the run in its workdir.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from drl_jax.config import Config, ConfigError, TrainConfig
from drl_jax.data.batches import TrainBatches, load_split
from drl_jax.data.records import MANIFEST, VideoDataset, dataset_dir
from drl_jax.evaluation.evaluator import Evaluator
from drl_jax.evaluation.metrics import format_table
from drl_jax.runs.checkpoints import SELECTION_METRIC, Checkpoints
from drl_jax.runs.workdir import JsonlWriter, claim_workdir, write_json
from drl_jax.runtime import cli as command
from drl_jax.runtime import distributed
from drl_jax.runtime.distributed import any_process, is_main
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.signals import StopRequest
from drl_jax.sharding import Layout, make_layout
from drl_jax.training.optimizer import make_optimizer, make_schedule
from drl_jax.training.state import TrainState, abstract_state, create_state, state_from_params
from drl_jax.training.train_step import make_train_step
from drl_jax.weights.load import initial_params, read_weights, with_sizes_of

Scalars = dict[str, float]


class TrainingError(UserError):
    """A run that cannot go on."""


class Interrupted(UserError):
    """A run that was stopped after a checkpoint."""


def train(config: Config, workdir: Path) -> dict[str, Any]:
    """Trains, evaluates each epoch on val, and tests the best checkpoint.

    Args:
      config: the run.
      workdir: where checkpoints, logs and results go. If it holds this run already, it resumes.

    Returns:
      What `result.json` holds: {"test": {"t2v": .., "v2t": ..}, "best_step": .., ..}.

    Raises:
      UserError: wrong configuration, missing data, another run in `workdir`, a loss that is not
        finite, or a signal that asked to stop (after a checkpoint).
    """
    # ---------------------------------------------------------------- devices, weights, data
    brought = None
    if config.model.init:
        weights = read_weights(Path(config.model.init))
        config = with_sizes_of(config, weights)
        brought = initial_params(config.model, weights, jax.random.key(config.seed))
        del weights
    layout = make_layout(fsdp=config.sharding.fsdp)
    _check_divisible(config.train, layout)
    dataset = _open_dataset(config)
    batches = TrainBatches(
        dataset,
        load_split(dataset, "train", config.data),
        config.data,
        config.train.batch_size,
        config.seed,
    )
    val, test = (load_split(dataset, name, config.data) for name in ("val", "test"))
    steps_per_epoch = batches.steps_per_epoch
    total_steps = config.train.epochs * steps_per_epoch

    # ---------------------------------------------------------------- model and optimiser
    tx = make_optimizer(config.optim, total_steps)
    step_function = make_train_step(
        config.model,
        config.loss,
        tx,
        layout,
        seed=config.seed,
        microbatch=config.train.microbatch,
    )
    evaluator = Evaluator(config, dataset, layout)
    claim_workdir(workdir, config)  # nothing is written before all of the above holds

    with Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints, StopRequest() as stop:
        # The order of initialisation: resume > init > scratch.
        resumed = checkpoints.latest_step()
        if resumed is not None:
            state = checkpoints.restore_state(resumed, abstract_state(config.model, tx, layout))
            if is_main():
                print(f"resuming {workdir} from step {resumed} of {total_steps}")
        elif brought is not None:
            state = state_from_params(brought, tx, layout)
        else:
            state = create_state(config.model, tx, config.seed, layout)
        del brought
        start = int(state.step)
        log = _Log(workdir, config, start, total_steps)
        log.announce(dataset, batches.num_examples, layout)

        # ---------------------------------------------------------------- the loop
        def evaluate_and_save(step: int, state: TrainState) -> None:
            log.flush(step)
            found = evaluator.run(state.params, val).metrics
            log.evaluation(step, found)
            checkpoints.save(state, {SELECTION_METRIC: found["t2v"]["R@1"]})

        if total_steps == 0 and resumed is None:
            evaluate_and_save(0, state)
        stream = batches.on_devices(start, layout)
        stopping = False
        for step in range(start + 1, total_steps + 1):
            state, scalars = step_function(state, next(stream))
            log.train_step(step, scalars)
            if jax.process_count() == 1 or _is_due(step, config.train.log_every):
                stopping = any_process(stop.pending)  # all stop after the same step
            if step % steps_per_epoch == 0:
                evaluate_and_save(step, state)
            elif stopping or _is_due(step, config.train.checkpoint_every):
                log.flush(step)
                checkpoints.save(state)
            if stopping:
                log.close()
                raise Interrupted(f"stopped after step {step}; the same command resumes")
        log.close()

        # ---------------------------------------------------------------- the best one's test
        best_step = checkpoints.best_step()
        params = checkpoints.restore_params(
            best_step, abstract_state(config.model, tx, layout).params
        )
    result = {
        "test": evaluator.run(params, test).metrics,
        "val": evaluator.run(params, val).metrics,
        "best_step": best_step,
        "total_steps": total_steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    if is_main():
        write_json(workdir / "result.json", result)
        print(f"test of the best checkpoint, step {best_step} of {total_steps}:")
        print(format_table(result["test"]))
    return result


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_divisible(train: TrainConfig, layout: Layout) -> None:
    for name in ("batch_size", "microbatch"):
        if getattr(train, name) % layout.devices:
            raise ConfigError(
                f"config.train.{name}={getattr(train, name)} does not divide over"
                f" {layout.devices} devices; choose a multiple of {layout.devices}"
            )


def _open_dataset(config: Config) -> VideoDataset:
    """The dataset, built first if the configuration says so and it is absent."""
    directory, data = dataset_dir(config), config.data
    if data.build_if_absent and not directory.exists() and jax.process_count() == 1:
        print(f"no dataset in {directory} yet: building it", flush=True)
        # A program of its own: data_prep builds on this package, never the reverse.
        build = ["-m", "data_prep.build", data.dataset, f"--data_dir={data.data_dir}"]
        if subprocess.run([sys.executable, *build, *data.build_flags.split()]).returncode:
            raise TrainingError(f"building {data.dataset} failed; see above")
    return VideoDataset(directory)


class _Log:
    """Where training says what it does: the progress bar, TensorBoard and `metrics.jsonl`."""

    def __init__(self, workdir: Path, config: Config, step: int, total_steps: int):
        self._config = config
        optim = config.optim
        self._schedule = make_schedule(optim.lr, optim.warmup_proportion, total_steps)
        self._writers: list = []
        if is_main():
            self._writers = [JsonlWriter(workdir, step), *_tensorboard_writers(workdir)]
        self._since: list[dict[str, jax.Array]] = []
        self._last_time = time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not is_main(),
        )
        self._status: dict[str, str] = {}

    def announce(self, dataset: VideoDataset, examples: int, layout: Layout) -> None:
        if not is_main():
            return
        devices = layout.mesh.devices
        tqdm.write(
            f"{self._config.data.dataset}: {len(dataset)} videos, {examples} examples an epoch;"
            f" {devices.size} {devices.flat[0].platform} device(s),"
            f" {jax.process_count()} process(es)"
        )
        if manifest := dataset.manifest:
            annotations = ", ".join(
                f"{name} {digest[:8]}" for name, digest in manifest["annotations"].items()
            )
            tqdm.write(
                f"made of {annotations}; content {manifest['content'][:8]}, decoded by PyAV"
                f" {manifest['versions']['av']}, {len(manifest['left_out'])} videos left out"
                f" ({dataset.directory / MANIFEST})"
            )

    def train_step(self, step: int, scalars: dict[str, jax.Array]) -> None:
        """Waits for the step before this one, so that the host is one step ahead, not hundreds."""
        if self._since:
            jax.block_until_ready(self._since[-1])
        self._since.append(scalars)
        self._bar.update()
        if step % self._config.train.log_every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Writes the mean of the steps since the last time.

        Raises:
          TrainingError: the loss is not finite; before a checkpoint or an evaluation sees it.
        """
        if not self._since:
            return
        host = jax.device_get(self._since)
        means = {f"train/{name}": float(np.mean([s[name] for s in host])) for name in host[0]}
        if not np.isfinite(means["train/loss"]):
            raise TrainingError(
                f"the loss is not finite near step {step}; the checkpoints before it are kept."
                " A smaller config.optim.lr, or a look at the data, may help"
            )
        now = time.monotonic()
        examples = len(host) * self._config.train.batch_size
        means["train/examples_per_second"] = examples / (now - self._last_time)
        # The rates of the step that was just taken, counted from 0.
        means["train/lr"] = float(self._schedule(step - 1))
        means["train/lr_clip"] = means["train/lr"] * self._config.optim.coef_lr
        self._write(step, means)
        self._since, self._last_time = [], now
        self._status["loss"] = f"{means['train/loss']:.3f}"
        self._bar.set_postfix(self._status)

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        scalars = {
            f"eval/{direction}_{name.replace('@', '')}": value
            for direction in ("t2v", "v2t")
            for name, value in metrics[direction].items()
        }
        if "pair_accuracy" in metrics:
            scalars["eval/pair_accuracy"] = metrics["pair_accuracy"]
        self._write(step, scalars)
        self._status["val R@1"] = f"{scalars['eval/t2v_R1']:.1f}"
        self._bar.set_postfix(self._status)
        self._last_time = time.monotonic()  # what an evaluation takes is not the steps'

    def _write(self, step: int, scalars: Scalars) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def close(self) -> None:
        self._bar.close()
        for writer in self._writers[1:]:
            writer.close()


def _tensorboard_writers(workdir: Path) -> list:
    """clu's writer for TensorBoard, or none where TensorFlow is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from clu import metric_writers
    except ImportError:
        print("TensorFlow is not installed: no TensorBoard files, only metrics.jsonl")
        return []
    return [metric_writers.SummaryWriter(str(workdir))]


_CONFIG = command.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Directory of the run; runs/NAME of configs/NAME.py if not given."
)


distributed.define_flags()


def main() -> None:
    distributed.initialize_from_flags()
    config = Config.from_dict(_CONFIG.value.to_dict())
    workdir = Path(_WORKDIR.value or command.default_workdir())
    train(config, workdir)


if __name__ == "__main__":
    command.run(main)
