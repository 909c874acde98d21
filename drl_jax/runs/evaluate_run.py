"""Evaluates a checkpoint of a run."""

from pathlib import Path
from typing import Any

from drl_jax.config import Config
from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.evaluation.evaluator import Evaluator, order_by_content
from drl_jax.evaluation.metrics import format_table
from drl_jax.runs.run_params import restore_params
from drl_jax.runs.workdir import MANIFEST_FILE, WorkdirError, read_manifest
from drl_jax.runtime.files import write_json
from drl_jax.sharding import make_layout


def evaluate(
    workdir: Path,
    config: Config,
    *,
    checkpoint: str = "best",
    split_name: str = "test",
    frame_order: str = "time",
) -> dict[str, Any]:
    """Computes the metrics of a checkpoint on a split and writes `eval_SPLIT_STEP.json`.

    Args:
      workdir: directory of the run.
      config: the run's configuration.
      checkpoint: "best", "latest" or a step.
      split_name: "test", "val", "train", or a stored split of the dataset.
      frame_order: "time", or "content" to sort the frames of each video by their pixels, which
        hides time from the model (written to `eval_SPLIT_STEP_content.json`).

    Returns:
      {"split": .., "step": .., "frame_order": .., "metrics": {"t2v": .., "v2t": ..}}.

    Raises:
      UserError: no such run, checkpoint, dataset or split; or, after the metrics were printed, the
        file cannot be written.
    """
    layout = make_layout(fsdp=config.sharding.fsdp)
    step, params = restore_params(workdir, config.model, layout, checkpoint)
    dataset = VideoDataset(dataset_dir(config))
    _note_other_content(workdir, dataset)
    split = load_split(dataset, split_name, config.data)
    evaluator = Evaluator(config, dataset, layout)
    order = order_by_content if frame_order == "content" else None
    metrics = evaluator.run(params, split, frame_order=order).metrics
    result = {"split": split_name, "step": step, "frame_order": frame_order, "metrics": metrics}
    suffix = "_content" if frame_order == "content" else ""
    print(f"{split_name} of checkpoint {step}, {len(split.videos)} videos:")
    print(format_table(metrics), flush=True)
    path = workdir / f"eval_{split_name}_{step}{suffix}.json"
    try:
        write_json(path, result)
    except OSError as error:
        raise WorkdirError(
            f"the metrics are complete, but {path} cannot be written: {error.strerror}"
        ) from error
    return result


def _note_other_content(workdir: Path, dataset: VideoDataset) -> None:
    """Says so if the run was trained with another build of the dataset."""
    manifest = workdir / MANIFEST_FILE
    expected = read_manifest(manifest)["dataset"]["content"] if manifest.exists() else ""
    if expected and dataset.content and expected != dataset.content:
        print(f"note: {workdir} was trained with other frames or captions than {dataset.directory}")
