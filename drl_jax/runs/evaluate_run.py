"""Evaluates a checkpoint of a run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drl_jax.config import Config
from drl_jax.evaluation.bootstrap import intervals
from drl_jax.evaluation.evaluator import Evaluation
from drl_jax.evaluation.legacy import legacy_metrics
from drl_jax.evaluation.metrics import format_table, metrics_of
from drl_jax.runs.open_evaluation import OpenEvaluation, open_evaluation
from drl_jax.runs.post_processing_run import PostProcessing, Ranked
from drl_jax.runs.protocol_card import ProtocolCard
from drl_jax.runs.rank_files import evaluation_path, write_ranks
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.files import write_json

# No post-processing.
NONE = "none"


class Evaluated(NamedTuple):
    """A checkpoint and a split, and what the evaluation found without post-processing."""

    opened: OpenEvaluation
    evaluation: Evaluation


def evaluate(
    workdir: Path,
    config: Config,
    *,
    checkpoint: str = "best",
    split_name: str = "test",
    frame_order: str = "time",
    legacy: bool = False,
    post: Sequence[str] = (NONE,),
    bank_size: int | None = None,
) -> Evaluated:
    """Computes the metrics of a checkpoint on a split; writes `eval_SPLIT_STEP.json` and `.npz`.

    The JSON is {"split": .., "step": .., "frame_order": .., "metrics": {"t2v": .., "v2t": ..},
    "intervals": .., "legacy": .., "card": ..}.

    Args:
      workdir: directory of the run.
      config: the run's configuration.
      checkpoint: "best", "latest" or a step.
      split_name: "test", "val", "train", or a stored split of the dataset.
      frame_order: "time", or "content" to sort the frames of each video by their pixels, which
        hides time from the model (written to `eval_SPLIT_STEP_content.json`).
      legacy: whether to print the tables of `legacy_metrics`, too.
      post: NONE for raw similarities, and names of `post_processing.METHODS`; one table each
        (written to `eval_SPLIT_STEP_METHOD.json`).
      bank_size: number of captions of *train* that post-processing takes; None: 5,000 at most.

    Raises:
      UserError: no such run, checkpoint, dataset or split, or `PostProcessing` cannot be done; or,
        after the metrics were printed, the files cannot be written.
    """
    methods = [name for name in post if name != NONE]
    if bank_size is not None and not methods:
        raise UserError("--bank_size is that of --post=METHOD; give both")
    opened = open_evaluation(
        workdir, config, checkpoint=checkpoint, split_name=split_name, frame_order=frame_order
    )
    processing = PostProcessing(opened, methods, bank_size) if methods else None
    evaluation, raw = opened.run(), opened.card.post_processing
    sim_matrix = evaluation.sim_matrix
    ranked = {NONE: Ranked(evaluation.ranks, sim_matrix, sim_matrix, raw, raw)}
    if processing is not None:
        ranked |= processing.run(evaluation)
    for name in dict.fromkeys(post):
        card = dataclasses.replace(opened.card, post_processing=ranked[name].description)
        result = _result(ranked[name], split_name, frame_order, card)
        _print_result(ranked[name].title, result, card, legacy)
        suffix = ("_content" if frame_order == "content" else "") + (
            "" if name == NONE else f"_{name}"
        )
        path = evaluation_path(workdir, split_name, card.step, suffix)
        try:
            write_ranks(path.with_suffix(".npz"), ranked[name].ranks, card)
            write_json(path, result)
        except OSError as error:
            reason = Unavailable(path, error, "written")
            raise UserError(f"the metrics are complete, but {reason}") from error
    return Evaluated(opened, evaluation)


def _result(
    ranked: Ranked, split_name: str, frame_order: str, card: ProtocolCard
) -> dict[str, Any]:
    text_to_video = ranked.ranks.text_to_video
    return {
        "split": split_name,
        "step": card.step,
        "frame_order": frame_order,
        "metrics": metrics_of(ranked.ranks),
        "intervals": intervals(ranked.ranks),
        "legacy": {
            "t2v": legacy_metrics(ranked.t2v_scores, text_to_video)["t2v"],
            "v2t": legacy_metrics(ranked.v2t_scores, text_to_video)["v2t"],
        },
        "card": card.as_dict(),
    }


def _print_result(title: str, result: dict[str, Any], card: ProtocolCard, legacy: bool) -> None:
    print(
        f"{result['split']} of checkpoint {card.step}, {card.videos} videos, {title}, with 95 %"
        " intervals:"
    )
    print(format_table(result["metrics"], result["intervals"]))
    if legacy:
        print(_legacy_table(result["legacy"]))
    print(f"protocol\n{card}", flush=True)


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
