"""Evaluates a checkpoint of a run."""

from pathlib import Path
from typing import Any, NamedTuple

from drl_jax.config import Config
from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.evaluation.bootstrap import intervals
from drl_jax.evaluation.evaluator import Evaluation, Evaluator, check_split, order_by_content
from drl_jax.evaluation.legacy import legacy_metrics
from drl_jax.evaluation.metrics import format_table
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.runs.checksums import params_digest
from drl_jax.runs.protocol_card import ProtocolCard, protocol_card
from drl_jax.runs.rank_files import evaluation_path, write_ranks
from drl_jax.runs.run_params import restore_params
from drl_jax.runs.workdir import MANIFEST_FILE, WorkdirError, read_manifest
from drl_jax.runtime.files import write_json
from drl_jax.sharding import make_layout


class Evaluated(NamedTuple):
    """A checkpoint that was evaluated, and the protocol."""

    evaluation: Evaluation
    card: ProtocolCard


def evaluate_checkpoint(
    workdir: Path,
    config: Config,
    *,
    checkpoint: str = "best",
    split_name: str = "test",
    frame_order: str = "time",
) -> Evaluated:
    """Evaluates a checkpoint on a split; arguments and errors as of `evaluate`."""
    layout = make_layout(fsdp=config.sharding.fsdp)
    step, params = restore_params(workdir, config.model, layout, checkpoint)
    dataset = VideoDataset(dataset_dir(config))
    _note_other_content(workdir, dataset)
    split = load_split(dataset, split_name, config.data)
    check_split(split_name, split, dataset, load_tokenizer(config.model))
    card = protocol_card(
        workdir,
        config,
        dataset,
        split_name,
        split,
        checkpoint=checkpoint,
        step=step,
        parameters_sha256=params_digest(params),
        frame_order=frame_order,
    )
    order = order_by_content if frame_order == "content" else None
    evaluation = Evaluator(config, dataset, layout).run(params, split, frame_order=order)
    return Evaluated(evaluation, card)


def evaluate(
    workdir: Path,
    config: Config,
    *,
    checkpoint: str = "best",
    split_name: str = "test",
    frame_order: str = "time",
    legacy: bool = False,
) -> dict[str, Any]:
    """Computes the metrics of a checkpoint on a split; writes `eval_SPLIT_STEP.json` and `.npz`.

    Args:
      workdir: directory of the run.
      config: the run's configuration.
      checkpoint: "best", "latest" or a step.
      split_name: "test", "val", "train", or a stored split of the dataset.
      frame_order: "time", or "content" to sort the frames of each video by their pixels, which
        hides time from the model (written to `eval_SPLIT_STEP_content.json`).
      legacy: whether to print the table of `legacy_metrics`, too.

    Returns:
      {"split": .., "step": .., "frame_order": .., "metrics": {"t2v": .., "v2t": ..},
      "intervals": .., "legacy": .., "card": ..}.

    Raises:
      UserError: no such run, checkpoint, dataset or split; or, after the metrics were printed, the
        files cannot be written.
    """
    evaluation, card = evaluate_checkpoint(
        workdir, config, checkpoint=checkpoint, split_name=split_name, frame_order=frame_order
    )
    result = {
        "split": split_name,
        "step": card.step,
        "frame_order": frame_order,
        "metrics": evaluation.metrics,
        "intervals": intervals(evaluation.ranks),
        "legacy": legacy_metrics(evaluation.sim_matrix, evaluation.ranks.text_to_video),
        "card": card.as_dict(),
    }
    print(f"{split_name} of checkpoint {card.step}, {card.videos} videos, with 95 % intervals:")
    print(format_table(result["metrics"], result["intervals"]))
    if legacy:
        print(_legacy_table(result["legacy"]))
    print(f"protocol\n{card}", flush=True)
    suffix = "_content" if frame_order == "content" else ""
    path = evaluation_path(workdir, split_name, card.step, suffix)
    try:
        write_ranks(path.with_suffix(".npz"), evaluation.ranks, card)
        write_json(path, result)
    except OSError as error:
        raise WorkdirError(
            f"the metrics are complete, but {path} cannot be written: {error.strerror}"
        ) from error
    return result


def _legacy_table(metrics: dict[str, Any]) -> str:
    counts = ", ".join(
        f"{direction} averages {metrics[direction]['ranks']:,} ranks of"
        f" {metrics[direction]['queries']:,} queries"
        for direction in ("t2v", "v2t")
    )
    return (
        "legacy, the tie rule of DRL's original and CLIP4Clip, for comparison with papers:\n"
        f"{format_table(metrics)}\n{counts}"
    )


def _note_other_content(workdir: Path, dataset: VideoDataset) -> None:
    """Says so if the run was trained with another build of the dataset."""
    manifest = workdir / MANIFEST_FILE
    expected = read_manifest(manifest)["dataset"]["content"] if manifest.exists() else ""
    if expected and dataset.content and expected != dataset.content:
        print(f"note: {workdir} was trained with other frames or captions than {dataset.directory}")
