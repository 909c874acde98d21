"""Logs of a training run: progress bar, TensorBoard and `metrics.jsonl`."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from drl_jax.config import Config
from drl_jax.data.records import MANIFEST, VideoDataset
from drl_jax.runtime.distributed import is_main
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_text
from drl_jax.sharding import Layout
from drl_jax.training.optimizer import make_schedule


class TrainingError(UserError):
    """A run that cannot continue."""


class TrainLog:
    """Writes scalars of steps and evaluations; a context manager. Only process 0 writes."""

    def __init__(
        self, workdir: Path, config: Config, step: int, total_steps: int, *, evaluated: bool
    ):
        """Opens the logs of a run.

        Args:
          workdir: directory of the run.
          config: its configuration.
          step: step that the run resumes from.
          total_steps: steps of the whole run.
          evaluated: whether the checkpoint of `step` has been evaluated.
        """
        self._config = config
        optim = config.optim
        self._schedule = make_schedule(optim.lr, optim.warmup_proportion, total_steps)
        self._writers: list = []
        if is_main():
            jsonl = JsonlWriter(workdir, step, keep_evaluation=evaluated)
            self._writers = [jsonl, *_tensorboard_writers(workdir)]
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
        """Prints the dataset and the devices."""
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
                f"built from {annotations}; content {manifest['content'][:8]}, decoded by PyAV"
                f" {manifest['versions']['av']}, {len(manifest['left_out'])} videos left out"
                f" ({dataset.directory / MANIFEST})"
            )

    def train_step(self, step: int, scalars: dict[str, jax.Array]) -> None:
        """Records a step; waits for the previous one, so that the host is one step ahead."""
        if self._since:
            jax.block_until_ready(self._since[-1])
        self._since.append(scalars)
        self._bar.update()
        if step % self._config.train.log_every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Writes the mean of the steps since the last call.

        Raises:
          TrainingError: the loss is not finite.
        """
        if not self._since:
            return
        host = jax.device_get(self._since)
        means = {f"train/{name}": float(np.mean([s[name] for s in host])) for name in host[0]}
        if not np.isfinite(means["train/loss"]):
            raise TrainingError(
                f"the loss is not finite near step {step}; earlier checkpoints are kept. Try a"
                " smaller config.optim.lr, or check the data"
            )
        now = time.monotonic()
        examples = len(host) * self._config.train.batch_size
        means["train/examples_per_second"] = examples / (now - self._last_time)
        # Learning rates of the last step; the schedule counts from 0.
        means["train/lr"] = float(self._schedule(step - 1))
        means["train/lr_clip"] = means["train/lr"] * self._config.optim.coef_lr
        self._write(step, means)
        self._since, self._last_time = [], now
        self._status["loss"] = f"{means['train/loss']:.3f}"
        self._bar.set_postfix(self._status)

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes the metrics of an evaluation."""
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
        # Examples per second do not include the time of evaluations.
        self._last_time = time.monotonic()

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def __enter__(self) -> "TrainLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        for writer in self._writers[1:]:
            writer.close()


class JsonlWriter:
    """Appends scalars to `metrics.jsonl`: one object per write, with "step" and the tags."""

    def __init__(self, workdir: Path, resumed_step: int, *, keep_evaluation: bool):
        """Opens the file and removes the lines that the resumed run writes again.

        Args:
          workdir: directory of the run.
          resumed_step: lines of later steps are removed.
          keep_evaluation: whether to keep the evaluation of `resumed_step`.
        """
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            keep = _line_filter(resumed_step, keep_evaluation)
            write_text(self._path, "".join(line + "\n" for line in lines if keep(line)))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {tag: float(value) for tag, value in scalars.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _line_filter(resumed_step: int, keep_evaluation: bool) -> Callable[[str], bool]:
    def keep(line: str) -> bool:
        try:
            values = json.loads(line)
            step = values["step"]
        except (json.JSONDecodeError, KeyError):
            return False  # A line that a crash truncated.
        is_evaluation = any(tag.startswith("eval/") for tag in values)
        return step < resumed_step or (
            step == resumed_step and (keep_evaluation or not is_evaluation)
        )

    return keep


def _tensorboard_writers(workdir: Path) -> list:
    """clu's TensorBoard writer, or none where TensorFlow is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from clu import metric_writers
    except ImportError:
        print("TensorFlow is not installed: no TensorBoard files, only metrics.jsonl")
        return []
    return [metric_writers.SummaryWriter(str(workdir))]
