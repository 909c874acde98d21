"""Batches whose loss or gradient is not finite: what a run says of them, and how many it skips."""

import math
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from drl_jax.config import TrainConfig
from drl_jax.data.batches import TrainBatches
from drl_jax.runtime.distributed import is_main
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import write_json

# Scalars of a training step in the order in which one makes the next one infinite.
_PARTS = {
    "contrastive_loss": "the contrastive loss",
    "cdcr_loss": "the CDCR loss",
    "loss": "the loss",
    "grad_norm": "the gradient",
}


class TrainingError(UserError):
    """A run that cannot continue."""


class NonFiniteBatches:
    """The batches that a run left out; the training step keeps the state from before them.

    Attributes:
      steps: their steps, in order.
    """

    def __init__(self, workdir: Path, config: TrainConfig, batches: TrainBatches, steps: list[int]):
        """Continues with the `steps` that the run has left out before."""
        self._workdir, self._limit, self._batches = workdir, config.skip_nonfinite, batches
        self.steps = list(steps)

    def report(self, step: int, scalars: Mapping[str, float]) -> bool:
        """Whether a step is to be logged; all processes call it with the same scalars.

        The examples of a batch that is not finite are written to `nonfinite_STEP.json`.

        Args:
          step: the step, from 1.
          scalars: of `train_step`.

        Raises:
          TrainingError: more batches than `train.skip_nonfinite` were not finite.
        """
        part = next((text for name, text in _PARTS.items() if not math.isfinite(scalars[name])), "")
        if not part:
            return True
        self.steps.append(step)
        examples = self._batches.examples(step)
        path = self._workdir / f"nonfinite_{step}.json"
        if is_main():
            values = {name: repr(scalars[name]) for name in _PARTS}
            write_json(path, {"step": step, "scalars": values, "examples": examples})
        video, caption = examples[0]["video_id"], examples[0]["caption"]
        found = (
            f"step {step}: {part} is not finite; its {len(examples)} examples are in {path}"
            f" (the first: {video}, {caption!r})"
        )
        if len(self.steps) > self._limit:
            raise TrainingError(
                f"{found}. Earlier checkpoints are kept; look for damaged examples, try a smaller"
                f" config.optim.lr, or leave out such batches with"
                f" --config.train.skip_nonfinite={len(self.steps)} and rerun"
            )
        if is_main():
            tqdm.write(f"{found}; left out, {len(self.steps)} of at most {self._limit}")
        return False
