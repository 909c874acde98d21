"""Evaluates a checkpoint of a run.

    python -m drl_jax.evaluate --workdir=DIR [--checkpoint=best|latest|STEP] [--split=test]

`--frame_order=content` sorts the frames of each video by their pixels first: what a model still
finds then, it does not find by time.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

from drl_jax.config import Config
from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.evaluation.evaluator import Evaluator, order_by_content
from drl_jax.evaluation.metrics import format_table
from drl_jax.runs.checkpoints import DIRECTORY, CheckpointError, Checkpoints
from drl_jax.runs.workdir import load_config, write_json
from drl_jax.runtime import cli as command
from drl_jax.sharding import make_layout
from drl_jax.training.state import abstract_params


def evaluate(
    workdir: Path,
    config: Config,
    *,
    checkpoint: str = "best",
    split_name: str = "test",
    frame_order: str = "time",
) -> dict[str, Any]:
    """Metrics of one checkpoint on one split; also written to `eval_SPLIT_STEP.json`.

    Args:
      workdir: directory of the run.
      config: the run's configuration.
      checkpoint: "best", "latest" or a step.
      split_name: "test", "val", "train", or a stored split of the dataset.
      frame_order: "time", or "content" to take the order of time away from the model (written to
        `eval_SPLIT_STEP_content.json`).

    Returns:
      {"split": .., "step": .., "frame_order": .., "metrics": {"t2v": .., "v2t": ..}}.

    Raises:
      UserError: no such run, checkpoint, dataset or split.
    """
    if not (workdir / DIRECTORY).is_dir():
        raise CheckpointError(f"no checkpoints in {workdir}; training writes one after each epoch")
    layout = make_layout(fsdp=config.sharding.fsdp)
    dataset = VideoDataset(dataset_dir(config))
    split = load_split(dataset, split_name, config.data)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.find_step(checkpoint)
        params = checkpoints.restore_params(step, abstract_params(config.model, layout))
    evaluator = Evaluator(config, dataset, layout)
    order = order_by_content if frame_order == "content" else None
    metrics = evaluator.run(params, split, frame_order=order).metrics
    result = {"split": split_name, "step": step, "frame_order": frame_order, "metrics": metrics}
    suffix = "_content" if frame_order == "content" else ""
    write_json(workdir / f"eval_{split_name}_{step}{suffix}.json", result)
    print(f"{split_name} of checkpoint {step}, {len(split.videos)} videos:")
    print(format_table(metrics))
    return result


_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
_SPLIT = flags.DEFINE_string("split", "test", "train, val, test or a stored split.")
_FRAME_ORDER = flags.DEFINE_enum(
    "frame_order", "time", ["time", "content"], "Order of the frames of each video."
)
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Where datasets lie, if they were moved.")


def main() -> None:
    workdir = Path(_WORKDIR.value)
    config = load_config(workdir)
    if _DATA_DIR.value:
        data = dataclasses.replace(config.data, data_dir=_DATA_DIR.value)
        config = dataclasses.replace(config, data=data)
    evaluate(
        workdir,
        config,
        checkpoint=_CHECKPOINT.value,
        split_name=_SPLIT.value,
        frame_order=_FRAME_ORDER.value,
    )


if __name__ == "__main__":
    command.run(main)
