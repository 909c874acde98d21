"""Post-processes the similarities of an evaluation, with a bank of *train* and parameters of *val*.

A bank has other queries than the test: captions of *train* for text to video, videos of *train* for
video to text. Parameters are those of a grid that are best on *val*.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drl_jax.data.batches import load_split
from drl_jax.data.records import DatasetError
from drl_jax.data.splits import Split
from drl_jax.evaluation.evaluator import Evaluation
from drl_jax.evaluation.metrics import Ranks
from drl_jax.evaluation.post_processing import (
    METHODS,
    Similarities,
    describe,
    direction_ranks,
    fit,
    post_processed,
)
from drl_jax.models.interactions import Features
from drl_jax.runs.open_evaluation import OpenEvaluation
from drl_jax.runtime.errors import UserError

# Captions, and videos, of a bank unless the user says how many.
BANK_SIZE = 5000
# Of the sample of a bank.
_SEED = 0


class Ranked(NamedTuple):
    """Ranks of a split, and what they were computed from.

    Attributes:
      ranks: of both directions.
      t2v_scores: float [A, B], captions by videos, by which t2v ranks.
      v2t_scores: float [A, B], by which v2t ranks.
      title: of the post-processing, in a few words.
      description: of the post-processing, for the protocol card.
    """

    ranks: Ranks
    t2v_scores: np.ndarray
    v2t_scores: np.ndarray
    title: str
    description: str


@dataclasses.dataclass(frozen=True)
class Bank:
    """Queries of the training split.

    Attributes:
      captions: N captions.
      videos: int [M], record indices.
      description: how many there are, in words.
    """

    captions: list[str]
    videos: np.ndarray
    description: str


class PostProcessing:
    """The post-processing that an evaluation was asked for; checked before anything is encoded."""

    def __init__(self, opened: OpenEvaluation, methods: Sequence[str], bank_size: int | None):
        """Loads and checks the splits.

        Args:
          opened: the evaluation.
          methods: names of `post_processing.METHODS`.
          bank_size: captions of the bank, and videos at most; None: at most BANK_SIZE of both.

        Raises:
          UserError: an unknown method, no split *train* or *val*, a split that shares videos with
            another, or a bank that is larger than *train*.
        """
        if unknown := [name for name in methods if name not in METHODS]:
            raise UserError(f"no post-processing {unknown[0]!r}; there are {', '.join(METHODS)}")
        self._opened, self._methods = opened, methods
        try:
            self._val = opened.checked_split("val")
        except DatasetError as error:
            raise UserError(
                f"post-processing fits its parameters on val, which is missing: {error};"
                " --post=none needs none"
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
        name = other_name or self._opened.split_name
        shared = self._videos(split) & self._videos(other or self._opened.split)
        if shared:
            raise UserError(
                f"post-processing {use}, which shares {len(shared):,} videos with the split {name}"
            )

    def _videos(self, split: Split) -> set[str]:
        """What the videos of a split are cut from."""
        sources = self._opened.dataset.sources
        return {str(sources[video]) for video in split.videos}

    def run(self, evaluation: Evaluation) -> dict[str, Ranked]:
        """Post-processes an evaluation, by each method."""
        opened, split = self._opened, self._opened.split
        val = opened.evaluator.run(opened.params, self._val, frame_order=opened.frame_order)
        encoded = self._encoded_bank()
        test_similarities = self._similarities(evaluation, split, encoded)
        val_similarities = self._similarities(val, self._val, encoded)
        bank = "" if self._bank is None else self._bank.description
        ranked = {}
        for name in self._methods:
            fitted = fit(METHODS[name], val_similarities)
            t2v, v2t = (
                post_processed(METHODS[name], test_similarities, direction, fitted[direction])
                for direction in ("t2v", "v2t")
            )
            ranks = dataclasses.replace(
                direction_ranks(t2v, test_similarities),
                v2t=direction_ranks(v2t, test_similarities).v2t,
            )
            description = describe(METHODS[name], fitted, bank)
            ranked[name] = Ranked(ranks, t2v, v2t, METHODS[name].title, description)
        return ranked

    def _encoded_bank(self) -> tuple[Features, Features] | None:
        """The arrays of the captions and of the videos of the bank."""
        if self._bank is None:
            return None
        evaluator, params = self._opened.evaluator, self._opened.params
        order = self._opened.frame_order
        return (
            evaluator.encode_captions(params, self._bank.captions),
            evaluator.encode_videos(params, self._bank.videos, frame_order=order),
        )

    def _similarities(
        self, evaluation: Evaluation, split: Split, bank: tuple[Features, Features] | None
    ) -> Similarities:
        captions, videos = evaluation.sim_matrix.shape
        bank_captions = np.zeros((0, videos), np.float32)
        bank_videos = np.zeros((captions, 0), np.float32)
        if bank is not None:
            similarity, params = self._opened.evaluator.similarity, self._opened.params
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
    """Draws captions and videos of a training split, each without replacement.

    Args:
      train: the split.
      size: number of captions, and of videos if there are as many; None: see BANK_SIZE.

    Raises:
      UserError: the split has fewer captions.
    """
    captions = train.captions
    if size is not None and size > captions.pairs:
        raise UserError(f"--bank_size={size} is more than the {captions.pairs:,} captions of train")
    rng = np.random.default_rng(_SEED)

    def draw(available: int) -> np.ndarray:
        return np.sort(rng.permutation(available)[: BANK_SIZE if size is None else size])

    chosen, videos = draw(captions.pairs), train.videos[draw(len(train.videos))]
    return Bank(
        [captions.caption(pair) for pair in chosen],
        videos,
        f"{len(chosen):,} captions (t2v) and {len(videos):,} videos (v2t) of train, seed {_SEED}",
    )
