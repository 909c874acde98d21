"""Logs of a training run: progress bar, TensorBoard and `metrics.jsonl`.

docs/metrics.md has the table of all tags.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from drl_jax.config import Config
from drl_jax.data.batches import TrainBatches
from drl_jax.data.records import MANIFEST, VideoDataset
from drl_jax.evaluation.evaluator import Evaluation
from drl_jax.models.drl import Params
from drl_jax.runs.metrics_file import JsonlWriter
from drl_jax.runs.pictures import EvaluationPictures
from drl_jax.runs.tensorboard import Keep, describe, tensorboard_writer, writing
from drl_jax.runs.wall_time import WallTime
from drl_jax.runtime.distributed import is_main
from drl_jax.sharding import Layout
from drl_jax.training.flops import peak_flops, train_step_flops
from drl_jax.training.optimizer import make_schedule

# Values of `TrainBatches.cache`.
_CACHED = {
    "none": "read from disk each epoch",
    "memory": "kept in memory",
    "device": "kept on the devices",
}

# Tags of what differs between runs that are otherwise the same.
TIMING_TAGS = ("train/examples_per_second", "train/data_seconds", "train/mfu")


class TrainLog:
    """Writes what steps and evaluations give; a context manager. Only process 0 writes."""

    def __init__(
        self,
        workdir: Path,
        config: Config,
        step: int,
        total_steps: int,
        *,
        evaluated: bool,
        unlogged: Iterable[dict[str, float]],
        accept: Callable[[int, Mapping[str, float]], bool],
        pictures: EvaluationPictures,
        wall_time: WallTime,
    ):
        """Opens the logs of a run.

        Args:
          workdir: directory of the run.
          config: its configuration.
          step: step that the run resumes from.
          total_steps: steps of the whole run.
          evaluated: whether the checkpoint of `step` has been evaluated.
          unlogged: scalars of the steps before `step` that no mean has been written of.
          accept: called with each step and its scalars; whether they count.
          pictures: of evaluations, for TensorBoard.
          wall_time: waiting for steps is spent on "steps", writing on "logging".
        """
        self._workdir, self._config = workdir, config
        self._accept, self._wall_time = accept, wall_time
        self._pictures = pictures
        optim = config.optim
        self._schedule = make_schedule(optim.lr, optim.warmup_proportion, total_steps)
        self._jsonl = self._tensorboard = None
        if is_main():
            keep = kept_when_resumed(step, keep_evaluation=evaluated)
            self._jsonl = JsonlWriter(workdir, keep)
            self._tensorboard = tensorboard_writer(workdir, keep, self._jsonl.lines)
        self._seconds_at_peak = _seconds_at_peak(config) if is_main() else None
        # A step that the devices may still compute, and the scalars since the last mean.
        self._running: tuple[int, dict[str, jax.Array]] | None = None
        self._since = list(unlogged)
        self._restart_clock()
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not is_main(),
        )
        self._status: dict[str, str] = {}

    def announce(
        self, dataset: VideoDataset, batches: TrainBatches, layout: Layout, params: Params
    ) -> None:
        """Prints the dataset, where its frames are kept, and the devices.

        TensorBoard gets the configuration and the shapes of the parameters.
        """
        if self._tensorboard is not None:
            describe(self._tensorboard, self._config, params)
        if not is_main():
            return
        devices = layout.mesh.devices
        tqdm.write(
            f"{self._config.data.dataset}: {len(dataset)} videos,"
            f" {batches.num_examples} examples an epoch; frames are {_CACHED[batches.cache]};"
            f" {devices.size} {devices.flat[0].platform} device(s),"
            f" {jax.process_count()} process(es)"
        )
        if manifest := dataset.manifest:
            annotations = ", ".join(
                f"{name} {digest[:8]}" for name, digest in manifest["annotations"].items()
            )
            tqdm.write(
                f"built from {annotations}; content {manifest['content'][:8]}, decoded by PyAV"
                f" {manifest['versions']['av']}, {len(manifest['left_out'])} videos left out"
                f" ({dataset.directory / MANIFEST})"
            )

    def train_step(self, step: int, scalars: dict[str, jax.Array]) -> None:
        """Records a step; waits for the previous one, so that the host is one step ahead.

        Raises:
          TrainingError: from `accept`.
        """
        self._settle()
        self._running = (step, scalars)
        self._bar.update()
        if step % self._config.train.log_every == 0:
            self.write_means(step)
        self._wall_time.spent_on("logging")

    def _settle(self) -> None:
        """Waits for the step that is running and takes its scalars."""
        if self._running is None:
            return
        step, scalars = self._running
        self._running = None
        self._timed += 1
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        self._wall_time.spent_on("steps")
        if self._accept(step, values):
            # Norms that this step did not compute are NaN.
            self._since.append({name: v for name, v in values.items() if not math.isnan(v)})

    def write_means(self, step: int) -> None:
        """Writes the means of the steps since the last call.

        Raises:
          TrainingError: from `accept`.
        """
        self._settle()
        if not self._since:
            return
        names = dict.fromkeys(name for values in self._since for name in values)
        means = {
            f"train/{name}": float(np.mean([v[name] for v in self._since if name in v]))
            for name in names
        }
        seconds = time.monotonic() - self._clock_start
        examples = self._timed * self._config.train.batch_size
        means["train/examples_per_second"] = examples / seconds
        waited = self._wall_time.seconds.get("data", 0.0) - self._waited_before
        means["train/data_seconds"] = waited / self._timed
        if self._seconds_at_peak is not None:
            means["train/mfu"] = self._timed * self._seconds_at_peak / seconds
        # Learning rates of the last step; the schedule counts from 0.
        means["train/lr"] = float(self._schedule(step - 1))
        means["train/lr_clip"] = means["train/lr"] * self._config.optim.coef_lr
        self._write(step, means)
        self._since = []
        self._restart_clock()
        self._status["loss"] = f"{means['train/loss']:.3f}"
        self._bar.set_postfix(self._status)

    def before_checkpoint(self) -> list[dict[str, float]]:
        """Writes all files, and returns the scalars that the next mean needs.

        Raises:
          TrainingError: from `accept`.
        """
        self._settle()
        self._flush()
        self._wall_time.spent_on("logging")
        return list(self._since)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Writes the metrics and the pictures of an evaluation, all of them when it returns."""
        scalars = _by_tag("eval", evaluation.metrics)
        self._write(step, scalars)
        if self._tensorboard is not None and self._config.train.pictures:
            pictures = self._pictures.draw(evaluation)
            with writing(self._workdir):
                self._tensorboard.write_images(step, pictures)
        # Before its metric is attached to the checkpoint: a run that is killed later does not
        # evaluate this step again.
        self._flush()
        self._status["val R@1"] = f"{scalars['eval/t2v_R1']:.1f}"
        self._bar.set_postfix(self._status)
        self._restart_clock()
        self._wall_time.spent_on("logging")

    def test(self, step: int, metrics: dict[str, Any], best_step: int) -> None:
        """Writes the metrics of the test of a finished run.

        Args:
          step: the last step of the run.
          metrics: of the best checkpoint.
          best_step: its step.
        """
        self._write(step, {**_by_tag("test", metrics), "test/best_step": best_step})
        self._flush()

    def _restart_clock(self) -> None:
        """Rates are of the steps from here on; they do not include the time of evaluations."""
        self._timed, self._clock_start = 0, time.monotonic()
        self._waited_before = self._wall_time.seconds.get("data", 0.0)

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        with writing(self._workdir):
            for writer in (self._jsonl, self._tensorboard):
                if writer is not None:
                    writer.write_scalars(step, scalars)

    def _flush(self) -> None:
        # Each line of metrics.jsonl is in the file already.
        if self._tensorboard is not None:
            with writing(self._workdir):
                self._tensorboard.flush()

    def __enter__(self) -> "TrainLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if self._tensorboard is not None:
            with writing(self._workdir):
                self._tensorboard.close()


def _by_tag(prefix: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of `Evaluation` by tag."""
    scalars = {
        f"{prefix}/{direction}_{name.replace('@', '')}": value
        for direction in ("t2v", "v2t")
        for name, value in metrics[direction].items()
    }
    if "pair_accuracy" in metrics:
        scalars[f"{prefix}/pair_accuracy"] = metrics["pair_accuracy"]
    return scalars


def _seconds_at_peak(config: Config) -> float | None:
    """Seconds that a step takes at the peak rate of all devices; None if that is not known."""
    peak = peak_flops(jax.devices()[0].device_kind, config.model.dtype)
    if peak is None:
        return None
    data, batch_size = config.data, config.train.batch_size
    sizes = (batch_size, data.max_frames, data.max_words)
    return train_step_flops(config.model, config.loss, *sizes) / (peak * jax.device_count())


def kept_when_resumed(resumed_step: int, *, keep_evaluation: bool) -> Keep:
    """Which records a run that resumes from a step does not write again.

    Every start writes those of the test again.
    """

    def keep(step: int, tags: Iterable[str]) -> bool:
        groups = {tag.partition("/")[0] for tag in tags}
        if step != resumed_step or "test" in groups:
            return step < resumed_step
        return keep_evaluation or "eval" not in groups

    return keep
