"""Compares two runs on the same queries."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from drl_jax.evaluation.bootstrap import Difference, differences, format_differences
from drl_jax.evaluation.metrics import RANK_METRICS, Ranks
from drl_jax.runs.checkpoint_files import DamagedCheckpoint, owner
from drl_jax.runs.evaluate_run import RERANK, evaluate, open_evaluation
from drl_jax.runs.protocol_card import (
    ProtocolCard,
    evaluation_path,
    how_chosen,
    read_ranks,
    write_ranks,
)
from drl_jax.runs.run_params import find_step
from drl_jax.runs.workdir import CHECKPOINTS, load_config, with_data_dir
from drl_jax.runtime.errors import UserError

# The metric that the verdict is about.
MAIN_METRIC = "t2v R@1"


class RankedRun(NamedTuple):
    """A run, the ranks of one of its checkpoints on a split, and their protocol card."""

    workdir: Path
    ranks: Ranks
    card: ProtocolCard


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs, and their differences by metric (`bootstrap.differences`)."""

    one: RankedRun
    other: RankedRun
    differences: dict[str, Difference]

    def __str__(self) -> str:
        """A table, and one sentence on which run is better."""
        return _report(self.one, self.other, self.differences)

    __repr__ = __str__


def compare(
    one: Path,
    other: Path,
    *,
    checkpoint: str = "best",
    split_name: str = "test",
    rerank: int = 0,
    data_dir: str | None = None,
) -> Comparison:
    """Compares two runs on a split: their differences, and whether they are more than luck.

    Ranks that an evaluation of the same parameters has stored are used; without them, the run is
    evaluated, and they are stored.

    Args:
      checkpoint: "best", "latest" or a step, of both.
      split_name: "test", "val", "train", or a stored split of the dataset.
      rerank: candidates that the reranker of each run ranks again; 0: none.
      data_dir: directory of built datasets, if they were moved.

    Raises:
      UserError: no such run, checkpoint, dataset or split, or the splits have different queries.
    """
    how = (checkpoint, split_name, rerank, data_dir)
    runs = [_ranked(workdir, *how) for workdir in (one, other)]
    check_same_queries(*runs)
    return Comparison(runs[0], runs[1], differences(runs[0].ranks, runs[1].ranks))


def check_same_queries(one: RankedRun, other: RankedRun) -> None:
    """Raises UserError unless the ranks of two runs can be compared query by query.

    Frames may be stored in other sizes, numbers or encodings, as another model needs them.
    """
    cards = one.card, other.card
    same_queries = cards[0].queries == cards[1].queries
    same_content = cards[0].content == cards[1].content
    if not same_queries or (cards[0].frames == cards[1].frames and not same_content):
        what = "frames" if same_queries else "captions or videos"
        first, second = (
            f"{card.dataset}, split {card.split}, content {card.content[:12]}" for card in cards
        )
        raise UserError(
            f"{one.workdir} and {other.workdir} cannot be compared: they were tested on different"
            f" {what} ({first}; {second}); evaluate both on the same build of a dataset"
        )


def _ranked(
    workdir: Path, checkpoint: str, split_name: str, rerank: int, data_dir: str | None
) -> RankedRun:
    config = with_data_dir(load_config(workdir), data_dir)
    step = find_step(workdir, checkpoint)
    if rerank:
        what = {"checkpoint": checkpoint, "split_name": split_name, "rerank": rerank}
        evaluated = evaluate(workdir, config, **what, show=lambda result: None)
        return RankedRun(workdir, evaluated.reranked, evaluated.results[RERANK].card)
    stored = read_ranks(evaluation_path(workdir, split_name, step).with_suffix(".npz"))
    current = None
    # The evaluation of a damaged checkpoint says what is damaged.
    with contextlib.suppress(DamagedCheckpoint):
        current = stored and owner(workdir / CHECKPOINTS / str(step))["params"]
    if stored is not None and stored[1].parameters_sha256 == current:
        ranks, card = stored
        # It may have been evaluated as the latest, or by its number.
        chosen = how_chosen(workdir, config.data, checkpoint, step)
        return RankedRun(workdir, ranks, dataclasses.replace(card, chosen=chosen))
    print(f"evaluating checkpoint {step} of {workdir} on {split_name}", flush=True)
    opened = open_evaluation(
        workdir, config, checkpoint=checkpoint, split_name=split_name, frame_order="time"
    )
    ranks = opened.run().ranks
    # A read-only run can be compared, too.
    with contextlib.suppress(OSError):
        path = evaluation_path(workdir, split_name, opened.card.step)
        write_ranks(path.with_suffix(".npz"), ranks, opened.card)
    return RankedRun(workdir, ranks, opened.card)


def _report(one: RankedRun, other: RankedRun, found: Mapping[str, Difference]) -> str:
    card = one.card
    lines = [
        f"{card.dataset}, split {card.split}: {card.videos:,} videos,"
        f" {card.captions:,} captions, similarities: {card.post_processing}"
    ]
    for name, run in (("A", one), ("B", other)):
        seed = ", ".join(map(str, run.card.seeds))
        lines.append(
            f"{name}  {run.workdir}: step {run.card.step}, {run.card.chosen}; seed {seed}; frames"
            f" {run.card.frames}"
        )
    lines.append(format_differences(found, "A", "B"))
    return "\n".join([*lines, verdict(MAIN_METRIC, found[MAIN_METRIC])])


def verdict(name: str, metric: Difference) -> str:
    """One sentence: which of the runs A and B is better, and whether that is more than luck."""
    change = metric.other - metric.one
    if not change:
        return f"{name} is the same for A and B."
    better, worse = ("B", "A") if (change > 0) != name.endswith(RANK_METRICS) else ("A", "B")
    luck = (
        f"is more than the luck of which videos are in the split (p = {metric.p_value:.3f})"
        if metric.is_more_than_luck
        else f"may be the luck of which videos are in the split (p = {metric.p_value:.2f})"
    )
    return (
        f"{name}: {better} is better than {worse} by {abs(change):.1f}, which {luck}. Another"
        " seed of the training may change it more: see --seeds of drl_jax.train."
    )
