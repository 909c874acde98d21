"""Evaluates a checkpoint of a run, with or without post-processing of the similarities.

Post-processing takes a bank of *train* and parameters of *val*. A bank has other queries than the
test: captions of *train* for text to video, videos of *train* for video to text. Parameters are
those of a grid that are best on *val*.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drl_jax.config import Config
from drl_jax.data.batches import load_split
from drl_jax.data.records import DatasetError, VideoDataset, dataset_dir
from drl_jax.data.splits import Split
from drl_jax.evaluation.bootstrap import Difference, differences, format_differences, intervals
from drl_jax.evaluation.evaluator import (
    Evaluation,
    Evaluator,
    FrameOrder,
    check_split,
    order_by_content,
)
from drl_jax.evaluation.legacy import legacy_metrics
from drl_jax.evaluation.metrics import Ranks, format_table, metrics_of
from drl_jax.evaluation.post_processing import (
    METHODS,
    Similarities,
    describe,
    direction_ranks,
    fit,
    post_processed,
)
from drl_jax.evaluation.reranking import check_candidates, rerank_evaluation
from drl_jax.models.drl import Params
from drl_jax.models.interactions import Features
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.runs.protocol_card import (
    RAW,
    ProtocolCard,
    evaluation_path,
    protocol_card,
    write_ranks,
)
from drl_jax.runs.reranker_file import RERANKER_FILE, LoadedReranker
from drl_jax.runs.run_params import restore_params
from drl_jax.runs.workdir import own_manifest
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.files import write_json
from drl_jax.runtime.sharding import Layout, make_layout

# No post-processing; and the result of the reranker, by its number of candidates.
NONE, RERANK = "none", "rerank"
# Captions, and videos, of a bank unless the user says how many; and the seed of the sample.
BANK_SIZE, _BANK_SEED = 5000, 0


@dataclasses.dataclass(frozen=True)
class OpenEvaluation:
    """A checkpoint and a split, ready to be evaluated.

    Attributes:
      split_name: as it was asked for.
      frame_order: applied to the frames of every video; None: the order of time.
      card: the protocol, without post-processing.
    """

    workdir: Path
    layout: Layout
    config: Config
    params: Params
    dataset: VideoDataset
    split_name: str
    split: Split
    evaluator: Evaluator
    frame_order: FrameOrder | None
    card: ProtocolCard

    def run(self, split: Split | None = None) -> Evaluation:
        split = self.split if split is None else split
        return self.evaluator.run(self.params, split, frame_order=self.frame_order)


@dataclasses.dataclass(frozen=True)
class Result:
    """Metrics of a checkpoint of a run on a split.

    Attributes:
      split: as it was asked for.
      metrics: by direction, "t2v" and "v2t": recall in percent, and ranks from 1; and "pairs" where
        the split has pairs of hard negatives.
      intervals: of 95 %: [lower, upper] in place of each metric.
      card: the protocol.
      legacy: metrics with the tie rule of DRL's original; None after a training.
      title: of the post-processing, in a few words.
      differences: of a reranked list to the first stage; None for others.
    """

    workdir: Path
    split: str
    metrics: dict[str, dict[str, float]]
    intervals: dict[str, Any]
    card: ProtocolCard
    legacy: dict[str, Any] | None = None
    title: str = RAW
    differences: dict[str, Difference] | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of `eval_SPLIT_STEP.json`."""
        changes = {name: one._asdict() for name, one in (self.differences or {}).items()}
        return {
            "split": self.split,
            "step": self.card.step,
            "frame_order": self.card.frame_order,
            "metrics": self.metrics,
            "intervals": self.intervals,
            "legacy": self.legacy,
            "card": dataclasses.asdict(self.card),
            **({"differences": changes} if changes else {}),
        }

    def __str__(self) -> str:
        """The table of the metrics, and the protocol."""
        title = (
            f"{self.split} of checkpoint {self.card.step}, {self.card.videos} videos, {self.title},"
            " with 95 % intervals:"
        )
        table = format_table(self.metrics, self.intervals)
        if self.differences:
            table += f"\n{format_differences(self.differences, 'first', 'reranked')}"
        return f"{title}\n{table}\nprotocol\n{self.card}"

    __repr__ = __str__

    def legacy_table(self) -> str:
        """The table of the metrics with the tie rule of DRL's original."""
        counts = ", ".join(
            f"{name} averages {self.legacy[name]['ranks']:,} ranks of"
            f" {self.legacy[name]['queries']:,} queries"
            for name in ("t2v", "v2t")
        )
        title = "legacy, the tie rule of DRL's original and CLIP4Clip, for comparison with papers:"
        return f"{title}\n{format_table(self.legacy)}\n{counts}"


class Evaluated(NamedTuple):
    """What was evaluated; the result without post-processing; and results by post-processing.

    `reranked` are the ranks after a reranker, None without one.
    """

    opened: OpenEvaluation
    evaluation: Evaluation
    results: dict[str, Result]
    reranked: Ranks | None = None


class Ranked(NamedTuple):
    """Ranks of a split, and what they were computed from.

    Attributes:
      t2v_scores: float [A, B], captions by videos, by which t2v ranks; `v2t_scores` likewise.
      title: of the post-processing, in a few words; `description` is for the protocol card.
    """

    ranks: Ranks
    t2v_scores: np.ndarray
    v2t_scores: np.ndarray
    title: str
    description: str


def evaluate(
    workdir: Path,
    config: Config,
    *,
    checkpoint: str = "best",
    split_name: str = "test",
    frame_order: str = "time",
    post: Sequence[str] = (NONE,),
    bank_size: int | None = None,
    rerank: int = 0,
    show: Callable[[Result], object] = print,
) -> Evaluated:
    """Computes the metrics of a checkpoint on a split; writes `eval_SPLIT_STEP.json` and `.npz`.

    The JSON is {"split": .., "step": .., "frame_order": .., "metrics": {"t2v": .., "v2t": ..},
    "intervals": .., "legacy": .., "card": ..}.

    Args:
      checkpoint: "best", "latest" or a step.
      split_name: "test", "val", "train", or a stored split of the dataset.
      frame_order: "time", or "content" to sort the frames of each video by their pixels, which
        hides time from the model (`_content` is added to the names).
      post: NONE for raw similarities, and names of `post_processing.METHODS`, which are added to
        the names; one table each.
      bank_size: see `PostProcessing`.
      rerank: candidates of each query that the run's reranker ranks again; 0: none. Both stages
        are results, `none` and `rerank`.
      show: takes each result before its files are written.

    Raises:
      UserError: no such run, checkpoint, dataset or split, or `PostProcessing` cannot be done; or,
        after the metrics were shown, the files cannot be written.
    """
    methods = [name for name in post if name != NONE]
    if bank_size is not None and not methods:
        raise UserError("bank_size is that of post=METHOD; give both")
    opened = open_evaluation(
        workdir, config, checkpoint=checkpoint, split_name=split_name, frame_order=frame_order
    )
    processing = PostProcessing(opened, methods, bank_size) if methods else None
    reranking = Reranking(opened, rerank) if rerank else None
    evaluation, raw = opened.run(), opened.card.post_processing
    sim_matrix = evaluation.sim_matrix
    ranked = {NONE: Ranked(evaluation.ranks, sim_matrix, sim_matrix, raw, raw)}
    if processing is not None:
        ranked |= processing.run(evaluation)
    if reranking is not None:
        ranked[RERANK] = reranking.run(evaluation)
    results = {}
    for name in dict.fromkeys([*post, *([RERANK] if rerank else [])]):
        card = dataclasses.replace(opened.card, post_processing=ranked[name].description)
        result = _result(workdir, split_name, ranked[name], card)
        if name == RERANK:
            changes = differences(evaluation.ranks, ranked[name].ranks)
            result = dataclasses.replace(result, differences=changes)
        results[name] = result
        show(result)
        order = "_content" if frame_order == "content" else ""
        method = "" if name == NONE else f"_{name}{rerank if name == RERANK else ''}"
        path = evaluation_path(workdir, split_name, card.step, order + method)
        try:
            write_ranks(path.with_suffix(".npz"), ranked[name].ranks, card)
            write_json(path, result.to_json())
        except OSError as error:
            reason = Unavailable(path, error, "written")
            raise UserError(f"the metrics are complete, but {reason}") from error
    reranked = ranked[RERANK].ranks if rerank else None
    return Evaluated(opened, evaluation, results, reranked)


def open_evaluation(
    workdir: Path, config: Config, *, checkpoint: str, split_name: str, frame_order: str
) -> OpenEvaluation:
    """Restores a checkpoint and loads a split; arguments and errors as of `evaluate`."""
    layout = make_layout(fsdp=config.sharding.fsdp)
    step, params = restore_params(workdir, config.model, layout, checkpoint)
    dataset = VideoDataset(dataset_dir(config))
    manifest = own_manifest(workdir)
    if manifest and manifest["dataset"]["content"] != dataset.content:
        print(f"note: {workdir} was trained with other frames or captions than {dataset.directory}")
    split = checked_split(dataset, split_name, config)
    inputs = (workdir, config, dataset, split_name, split)
    card = protocol_card(*inputs, checkpoint, step, params, frame_order=frame_order)
    evaluator = Evaluator(config, dataset, layout)
    order = order_by_content if frame_order == "content" else None
    files = (workdir, layout, config, params, dataset)
    return OpenEvaluation(*files, split_name, split, evaluator, order, card)


def checked_split(dataset: VideoDataset, name: str, config: Config) -> Split:
    split = load_split(dataset, name, config.data)
    check_split(name, split, dataset, load_tokenizer(config.model), config.data.max_words)
    return split


def _result(workdir: Path, split_name: str, ranked: Ranked, card: ProtocolCard) -> Result:
    text_to_video = ranked.ranks.text_to_video
    legacy = {
        "t2v": legacy_metrics(ranked.t2v_scores, text_to_video)["t2v"],
        "v2t": legacy_metrics(ranked.v2t_scores, text_to_video)["v2t"],
    }
    metrics, of_metrics = metrics_of(ranked.ranks), intervals(ranked.ranks)
    return Result(workdir, split_name, metrics, of_metrics, card, legacy, ranked.title)


class Reranking:
    """The first candidates of each query, ranked again by the reranker of the run."""

    def __init__(self, opened: OpenEvaluation, count: int):
        """Opens the reranker; UserError: there is none that fits, or there are fewer videos."""
        check_candidates(count, len(opened.split.videos), f"the split {opened.split_name}")
        path = opened.workdir / RERANKER_FILE
        self._reranker = LoadedReranker(path, opened.config, opened.params)
        self._opened, self._count = opened, count

    def run(self, evaluation: Evaluation) -> Ranked:
        changes = self._reranker.changes(evaluation.text, evaluation.video)
        scores, pairs = evaluation.sim_matrix + changes, self._opened.split.reversed_pairs
        found = rerank_evaluation(scores, evaluation, self._count, pairs)
        title = f"the first {self._count} candidates reranked"
        return Ranked(*found, title, f"{title} by {self._reranker.sha256[:12]}")


# ---------------------------------------------------------------- post-processing


class Bank(NamedTuple):
    """Queries of the training split: N captions, and the record indices of M videos, int [M]."""

    captions: list[str]
    videos: np.ndarray
    description: str


class PostProcessing:
    """The post-processing that an evaluation was asked for; checked before anything is encoded."""

    def __init__(self, opened: OpenEvaluation, methods: Sequence[str], bank_size: int | None):
        """Loads and checks the splits; `bank_size` is that of `draw_bank`.

        Raises:
          UserError: no split *train* or *val*, a split that shares videos with another, or a bank
            that is larger than *train*.
        """
        self._opened, self._methods = opened, methods
        try:
            self._val = checked_split(opened.dataset, "val", opened.config)
        except DatasetError as error:
            raise UserError(
                f"post-processing fits its parameters on val, which is missing: {error};"
                " post=none needs none"
            ) from error
        self._check_disjoint("fits its parameters on val", self._val)
        self._bank = None
        if not all(METHODS[name].uses_all_queries for name in methods):
            train = load_split(opened.dataset, "train", opened.config.data)
            self._check_disjoint("takes its bank from train", train)
            self._check_disjoint("takes its bank from train", train, "val", self._val)
            self._bank = draw_bank(train, bank_size)

    def _check_disjoint(
        self, use: str, split: Split, other_name: str = "", other: Split | None = None
    ) -> None:
        """Refuses a split that shares videos with the evaluated one, or with another."""
        named = self._opened.dataset.sources  # What videos are cut from.
        splits = (split, other or self._opened.split)
        one, two = ({str(named[video]) for video in part.videos} for part in splits)
        if shared := one & two:
            raise UserError(
                f"post-processing {use}, which shares {len(shared):,} videos with the split"
                f" {other_name or self._opened.split_name}"
            )

    def run(self, evaluation: Evaluation) -> dict[str, Ranked]:
        opened, bank, encoded = self._opened, self._bank, None
        val = opened.run(self._val)
        if bank is not None:
            evaluator, params, order = opened.evaluator, opened.params, opened.frame_order
            encoded = (
                evaluator.encode_captions(params, bank.captions),
                evaluator.encode_videos(params, bank.videos, frame_order=order),
            )
        test_similarities = self._similarities(evaluation, opened.split, encoded)
        val_similarities = self._similarities(val, self._val, encoded)
        ranked = {}
        for name in self._methods:
            method = METHODS[name]
            fitted = fit(method, val_similarities)
            t2v, v2t = (
                post_processed(method, test_similarities, direction, fitted[direction])
                for direction in ("t2v", "v2t")
            )
            ranks = dataclasses.replace(
                direction_ranks(t2v, test_similarities),
                v2t=direction_ranks(v2t, test_similarities).v2t,
            )
            description = describe(method, fitted, "" if bank is None else bank.description)
            ranked[name] = Ranked(ranks, t2v, v2t, method.title, description)
        return ranked

    def _similarities(
        self, evaluation: Evaluation, split: Split, bank: tuple[Features, Features] | None
    ) -> Similarities:
        captions, videos = evaluation.sim_matrix.shape
        bank_captions = np.zeros((0, videos), np.float32)
        bank_videos = np.zeros((captions, 0), np.float32)
        if bank is not None:
            similarity, params = self._opened.evaluator.embedder.similarity, self._opened.params
            bank_captions = similarity(params, bank[0], evaluation.video)
            bank_videos = similarity(params, evaluation.text, bank[1])
        return Similarities(
            evaluation.sim_matrix,
            bank_captions,
            bank_videos,
            split.caption_pairs()[0],
            split.reversed_pairs,
        )


def draw_bank(train: Split, size: int | None) -> Bank:
    """Draws `size` captions of a training split, and as many videos or all, without replacement.

    Without a size: at most BANK_SIZE of both.

    Raises:
      UserError: the split has fewer captions.
    """
    captions = train.captions
    if size is not None and size > captions.pairs:
        raise UserError(f"bank_size={size} is more than the {captions.pairs:,} captions of train")
    rng = np.random.default_rng(_BANK_SEED)

    def draw(available: int) -> np.ndarray:
        return np.sort(rng.permutation(available)[: BANK_SIZE if size is None else size])

    chosen, videos = draw(captions.pairs), train.videos[draw(len(train.videos))]
    counts = f"{len(chosen):,} captions (t2v) and {len(videos):,} videos (v2t)"
    description = f"{counts} of train, seed {_BANK_SEED}"
    return Bank([captions.caption(pair) for pair in chosen], videos, description)
