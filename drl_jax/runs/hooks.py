"""What a training run does beside its steps.

A hook is an object with some of the methods `start(step, state)`, `before_step(step, state)`,
`after_step(step, state, scalars)`, `after_checkpoint(step, state, stopping)` and `end()`, which is
called after an error, too. The time of its methods is spent on its `activity`.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from drl_jax.config import Config
from drl_jax.data.batches import TrainBatches
from drl_jax.data.records import VideoDataset
from drl_jax.data.splits import Split
from drl_jax.evaluation.evaluator import Evaluation, Evaluator
from drl_jax.models.drl import Params
from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.runs.checkpoints import Checkpoints
from drl_jax.runs.log_files import MetricsFile, TensorBoard
from drl_jax.runtime.distributed import is_main
from drl_jax.runtime.errors import UserError, one_line
from drl_jax.runtime.files import write_json
from drl_jax.training.flops import peak_flops, train_step_flops
from drl_jax.training.optimizer import make_schedule
from drl_jax.training.train_step import Scalars, TrainState
from drl_jax.training.trainable import Trainable

# Tags of what differs between runs that are otherwise the same.
TIMING_TAGS = ("train/examples_per_second", "train/data_seconds", "train/mfu")
# Scalars of a training step in the order in which one makes the next one infinite.
_PARTS = {
    "contrastive_loss": "the contrastive loss",
    "cdcr_loss": "the CDCR loss",
    "loss": "the loss",
    "grad_norm": "the gradient",
}
# Pairs of a caption and its video whose words and frames are drawn.
_PAIRS = 2
# Pixels per inch: words and numbers are readable, and a picture has some 50 kB.
_DPI = 72


class TrainingError(UserError):
    """A run that cannot continue."""


class WallTime:
    """Divides the time since it was created between activities.

    Attributes:
      seconds: by activity, in the order of their first use.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._until = time.monotonic()

    def spent_on(self, activity: str) -> None:
        """Counts the time since the last call as spent on an activity."""
        now = time.monotonic()
        self.seconds[activity] = self.seconds.get(activity, 0.0) + now - self._until
        self._until = now

    def __str__(self) -> str:
        """One line, the longest activity first; those below 0.5 % are left out."""
        total = sum(self.seconds.values()) or 1.0
        shares = sorted(self.seconds.items(), key=lambda item: -item[1])
        parts = [f"{name} {100 * s / total:.0f} %" for name, s in shares if s / total >= 0.005]
        return f"{total:.0f} s: {', '.join(parts)}"


class TrainLog:
    """Progress bar, `metrics.jsonl` and TensorBoard, which process 0 writes; docs/metrics.md.

    Also looks for steps that are not finite, which the training step leaves out.

    Attributes:
      skipped: steps whose batches were left out.
    """

    activity = "logging"

    def __init__(
        self,
        workdir: Path,
        config: Config,
        batches: TrainBatches,
        total_steps: int,
        wall_time: WallTime,
        step: int,
        saved: Mapping[str, Any],
        *,
        evaluated: bool,
    ):
        """Opens the logs of a run that resumes from the checkpoint of `step`.

        Args:
          evaluated: whether the checkpoint has been evaluated.
          saved: values of `before_checkpoint` that were saved with the checkpoint.
        """
        self._workdir, self._config, self._batches = workdir, config, batches
        self._wall_time = wall_time
        optim = config.optim
        self._schedule = make_schedule(optim.lr, optim.warmup_proportion, total_steps)
        self._metrics = self._tensorboard = self._seconds_at_peak = None
        if is_main():
            self._metrics = MetricsFile(workdir, step, evaluated=evaluated)
            try:
                self._tensorboard = TensorBoard(workdir, self._metrics)
            except ImportError:
                print("TensorBoard is not installed: no TensorBoard files, only metrics.jsonl")
            self._seconds_at_peak = _seconds_at_peak(config)
        # A step that the devices may still compute, and the scalars since the last mean.
        self._running: tuple[int, Scalars] | None = None
        self._since: list[dict[str, float]] = list(saved.get("unlogged", []))
        self.skipped: list[int] = list(saved.get("skipped", []))
        self._restart_clock()
        self._status: dict[str, str] = {}
        bar = {"desc": "training", "unit": "step", "dynamic_ncols": True, "disable": not is_main()}
        self._bar = tqdm(total=total_steps, initial=step, **bar)

    def start(self, step: int, state: TrainState) -> None:
        del step
        if self._tensorboard is not None and self._tensorboard.is_new:
            self._tensorboard.describe(self._config, state.params)

    def after_step(self, step: int, state: TrainState, scalars: Scalars) -> None:
        """Waits for the previous step, so that the host is one step ahead.

        Raises:
          TrainingError: more batches than `train.skip_nonfinite` were not finite.
        """
        del state
        self._settle()
        self._running = (step, scalars)
        self._bar.update()
        if step % self._config.train.log_every == 0:
            self._write_means(step)

    def before_checkpoint(self, step: int, *, ends_interval: bool) -> dict[str, Any]:
        """Writes all files, with the mean of the last steps if `ends_interval`.

        Returns what a resumed run needs. Errors as of `after_step`.
        """
        self._settle()
        if ends_interval:
            self._write_means(step)
        self._flush()
        return {"unlogged": list(self._since), "skipped": self.skipped}

    def _settle(self) -> None:
        """Waits for the step that is running and takes its scalars."""
        if self._running is None:
            return
        step, scalars = self._running
        self._running = None
        self._timed += 1
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        self._wall_time.spent_on("steps")
        if (part := next((p for p in _PARTS if not math.isfinite(values[p])), None)) is not None:
            self._leave_out(step, values, _PARTS[part])
        else:
            # Norms that this step did not compute are NaN.
            self._since.append({name: v for name, v in values.items() if not math.isnan(v)})

    def _leave_out(self, step: int, values: Mapping[str, float], part: str) -> None:
        """Writes the examples of a step that is not finite to `nonfinite_STEP.json`."""
        self.skipped = [*self.skipped, step]
        count, limit = len(self.skipped), self._config.train.skip_nonfinite
        examples = self._batches.examples(step)
        path = self._workdir / f"nonfinite_{step}.json"
        if is_main():
            scalars = {name: repr(values[name]) for name in _PARTS}
            write_json(path, {"step": step, "scalars": scalars, "examples": examples})
        video, caption = examples[0]["video_id"], examples[0]["caption"]
        found = (
            f"step {step}: {part} is not finite; its {len(examples)} examples are in {path}"
            f" (the first: {video}, {caption!r})"
        )
        if count > limit:
            raise TrainingError(
                f"{found}. Earlier checkpoints are kept; look for damaged examples, try a smaller"
                f" config.optim.lr, or leave out such batches with"
                f" config.train.skip_nonfinite={count} and rerun"
            )
        if is_main():
            tqdm.write(f"{found}; left out, {count} of at most {limit}")

    def _write_means(self, step: int) -> None:
        """Writes the means of the steps since the last call."""
        self._settle()
        if not self._since:
            return
        names = dict.fromkeys(name for values in self._since for name in values)
        means = {
            f"train/{name}": float(np.mean([v[name] for v in self._since if name in v]))
            for name in names
        }
        seconds = time.monotonic() - self._clock_start
        means["train/examples_per_second"] = self._timed * self._config.train.batch_size / seconds
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
        self._show("loss", f"{means['train/loss']:.3f}")

    @property
    def shows_pictures(self) -> bool:
        return self._tensorboard is not None and self._config.train.pictures

    def evaluation(
        self, step: int, metrics: Mapping[str, Any], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """Writes the metrics and the pictures of an evaluation; they are in the files then."""
        self._write(step, scalars_by_tag("eval", metrics))
        if pictures:
            self._tensorboard.write_images(step, pictures)
        self._flush()
        self._show("val R@1", f"{metrics['t2v']['R@1']:.1f}")
        self._restart_clock()

    def test(self, step: int, metrics: Mapping[str, Any], best_step: int) -> None:
        """Writes the metrics of the checkpoint `best_step` on *test*; `step` is the run's last."""
        self._write(step, {**scalars_by_tag("test", metrics), "test/best_step": best_step})
        self._flush()

    def end(self) -> None:
        self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _restart_clock(self) -> None:
        """Rates are of the steps from here on; they do not include the time of evaluations."""
        self._timed, self._clock_start = 0, time.monotonic()
        self._waited_before = self._wall_time.seconds.get("data", 0.0)

    def _show(self, name: str, value: str) -> None:
        self._status[name] = value
        self._bar.set_postfix(self._status)

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in (self._metrics, self._tensorboard):
            if writer is not None:
                writer.write_scalars(step, scalars)

    def _flush(self) -> None:
        # Each line of metrics.jsonl is in the file already.
        if self._tensorboard is not None:
            self._tensorboard.flush()


def scalars_by_tag(prefix: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an `Evaluation` by tag."""
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
    sizes = (config.train.batch_size, config.data.max_frames, config.data.max_words)
    trainable, stored = Trainable.of(config.optim), bool(config.data.features)
    flops = train_step_flops(config.model, config.loss, *sizes, trainable, stored)
    return flops / (peak * jax.device_count())


def has_pictures(epoch: int, epochs: int) -> bool:
    """Whether the evaluation after an epoch has pictures, which take longer than it: 1, 2, 4, 8 and
    so on, since a model changes most at first, and the last one."""
    return epoch & (epoch - 1) == 0 or epoch == epochs


class Evaluations:
    """Evaluates *val* after each epoch; the metric chooses the best checkpoint."""

    activity = "evaluation"

    def __init__(
        self,
        config: Config,
        evaluator: Evaluator,
        val: Split,
        dataset: VideoDataset,
        checkpoints: Checkpoints,
        log: TrainLog,
        wall_time: WallTime,
        abstract: Params,
        steps_per_epoch: int,
    ):
        self._config, self._evaluator, self._val, self._dataset = config, evaluator, val, dataset
        self._checkpoints, self._log, self._wall_time = checkpoints, log, wall_time
        self._abstract, self._steps_per_epoch = abstract, steps_per_epoch

    def start(self, step: int, state: TrainState) -> None:
        """Makes up for metrics that are damaged, or that a killed run did not write."""
        for damaged in self._checkpoints.with_damaged_metric():
            if damaged != step:
                self._evaluate_again(damaged)
        is_due = step % self._steps_per_epoch == 0 and (step or self._config.train.epochs == 0)
        if is_due and not self._checkpoints.is_evaluated(step):
            self._evaluate(step, state)

    def after_checkpoint(self, step: int, state: TrainState, stopping: bool) -> None:
        # A resumed run evaluates the checkpoint of an epoch that was not evaluated.
        if step % self._steps_per_epoch == 0 and not stopping:
            self._evaluate(step, state)

    def _evaluate(self, step: int, state: TrainState) -> None:
        evaluation = self._evaluator.run(state.params, self._val)
        self._wall_time.spent_on("evaluation")
        epoch = step // self._steps_per_epoch
        is_drawn = self._log.shows_pictures and has_pictures(epoch, self._config.train.epochs)
        pictures = self._pictures(evaluation) if is_drawn else {}
        # Before the metric: a run that is killed later does not evaluate this step again.
        self._log.evaluation(step, evaluation.metrics, pictures)
        self._wall_time.spent_on("logging")
        self._checkpoints.attach_metric(step, evaluation.metrics["t2v"]["R@1"])
        self._wall_time.spent_on("checkpoints")

    def _evaluate_again(self, step: int) -> None:
        if is_main():
            print(f"the metric of checkpoint {step} is damaged; evaluating it again")
        params = self._checkpoints.restore_or_set_aside(step, self._abstract)
        if params is not None:
            metrics = self._evaluator.run(params, self._val).metrics
            self._checkpoints.attach_metric(step, metrics["t2v"]["R@1"])

    def _pictures(self, evaluation: Evaluation) -> dict[str, np.ndarray]:
        """Similarities, and words and frames of a few pairs, always the same: uint8 [H, W, 3]."""
        # It takes half a second to import, which only runs with TensorBoard files need.
        from drl_jax.evaluation.figures import interaction_figure, rendered, similarity_figure

        pictures = {"eval/similarity": rendered(similarity_figure(evaluation.sim_matrix), _DPI)}
        interaction = INTERACTIONS[self._config.model.interaction]
        caption_to_video, captions = self._val.caption_pairs()
        has_maps = interaction.COMPARES_TOKENS and interaction.HAS_EXPLANATION
        count = min(_PAIRS, len(captions)) if has_maps else 0
        tokenizer = load_tokenizer(self._config.model)
        for number in range(count):
            caption = number * len(captions) // count
            video, sentence = caption_to_video[caption], captions[caption]
            record = self._val.videos[video]
            attribution = interaction.attribution(
                {name: array[caption] for name, array in evaluation.text.items()},
                {name: array[video] for name, array in evaluation.video.items()},
            )
            tokens = tokenizer.tokenize([sentence], self._config.data.max_words)
            frames = self._dataset.read_frames(record)
            figure = interaction_figure(
                attribution,
                tokenizer.strings_of(tokens)[0],
                [f"frame {frame + 1}" for frame in range(len(frames))],
                frames,
                f"{self._dataset.video_ids[record]}: {sentence}",
            )
            pictures[f"eval/words_and_frames_{number + 1}"] = rendered(figure, _DPI)
        return pictures


class StepProfile:
    """Traces the given steps into `plugins/profile` of a run; process 0 traces its own devices."""

    activity = "profile"

    def __init__(self, workdir: Path, steps: range):
        self._workdir, self._steps, self._tracing = workdir, steps, False

    def before_step(self, step: int, state: Any) -> None:
        if step in self._steps and is_main() and not self._tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._workdir)
            self._tracing = True

    def after_step(self, step: int, state: Any, scalars: Scalars) -> None:
        """Writes the trace after the last of the steps.

        Raises:
          TrainingError: it cannot be written.
        """
        del scalars
        if self._tracing and step + 1 not in self._steps:
            jax.block_until_ready(state)
            self.end()

    def end(self) -> None:
        """Writes the trace if there is one, also that of a run that stops meanwhile."""
        if not self._tracing:
            return
        self._tracing = False
        directory = self._workdir / "plugins" / "profile"
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"the profile cannot be written to {directory}: {one_line(error)}"
            ) from error
        tqdm.write(f"the profile is in {directory}")
