"""Collects what a report shows; `page.py` renders it."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from PIL import Image
from tqdm import tqdm

from drl_jax.config import Config
from drl_jax.data.splits import Split
from drl_jax.evaluation.bootstrap import intervals
from drl_jax.evaluation.metrics import Ranks
from drl_jax.models.drl import Params, model_definition
from drl_jax.models.interactions import INTERACTIONS, Attribution, Features
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.report.findings import (
    ConfusedPair,
    Duplicate,
    Hubness,
    WrongQuery,
    confused_pairs,
    duplicate_captions,
    hubness,
    worst_queries,
)
from drl_jax.runs.evaluate_run import RERANK, Evaluated, OpenEvaluation, Result
from drl_jax.runs.log_files import read_scalars
from drl_jax.runs.protocol_card import ProtocolCard
from drl_jax.runs.run_params import remake_initial_params
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.sharding import make_layout

# Entries of each list of the page.
_WORST, _CONFUSED, _HUBS, _DUPLICATES = 12, 8, 8, 8
# Videos of a duplicate caption that are shown.
VIDEOS_OF_DUPLICATE = 3
# Side of a frame that is shown, pixels.
_SIDE = 96
# Most pairs of a caption and its video that a correlation is computed from.
_PAIRS = 512
# Captions whose words and frames are drawn: some that are evenly spaced, and the worst.
_SPACED_QUERIES, _WORST_QUERIES = 8, 4


@dataclasses.dataclass(frozen=True)
class Channels:
    """Correlation of the channels of texts (rows) and videos, before and after a training.

    It is what the channel decorrelation loss works on (CDCR, section 3.3 of the paper): the
    diagonal should be 1, all else 0. Variant 3 standardises the channels without the weights that
    it takes the mean with, as the loss does, so a value can be above 1.
    """

    pairs: int  # of a caption and its video
    variant: int  # of CDCR, which says what the correlated rows are (`config.loss.cdcr`)
    after: np.ndarray  # float32 [D, D], of the checkpoint
    before: np.ndarray | None  # of the parameters that the run started from, if they are there
    missing: str = ""  # why they are not


class WordFrameMap(NamedTuple):
    """The interaction of the L words of a caption with the F frames of a video."""

    caption: int  # its row; `video` is a column
    video: int
    words: list[str]
    attribution: Attribution
    frames: np.ndarray  # uint8 [F, S, S, 3], small


@dataclasses.dataclass(frozen=True)
class ReportData:
    """What a report shows. Shapes: A captions, B videos."""

    run: str  # its name
    card: ProtocolCard
    metrics: dict[str, Any]  # of `metrics.metrics_of`
    intervals: dict[str, Any]  # their 95 % intervals
    ranks: Ranks
    sim_matrix: np.ndarray  # float32 [A, B]
    captions: list[str]
    videos: list[str]  # B ids
    history: list[dict[str, float]]  # scalars of the training by step (`read_scalars`)
    worst: list[WrongQuery]
    confused: list[ConfusedPair]
    hubness: Hubness
    duplicates: list[Duplicate]
    frames: dict[int, np.ndarray]  # of the videos that are shown, uint8 [F, S, S, 3], by column
    maps: list[WordFrameMap]  # of the `mapped_pairs`, if the interaction compares words with frames
    reranked: Result | None  # of the second stage, if there is one
    channels: Channels | None  # None for interactions without a correlation


def collect(workdir: Path, evaluated: Evaluated) -> ReportData:
    """Collects the report of an evaluated checkpoint.

    Raises:
      UserError: frames cannot be read.
      OSError: `metrics.jsonl` cannot be read.
    """
    opened, evaluation, *_ = evaluated
    split = opened.split
    sim_matrix, ranks = evaluation.sim_matrix, evaluation.ranks
    text_to_video, captions = split.caption_pairs()
    worst = worst_queries(sim_matrix, text_to_video, ranks.t2v, _WORST)
    confused = confused_pairs(sim_matrix, text_to_video, _CONFUSED)
    hubs = hubness(sim_matrix, _HUBS)
    duplicates = duplicate_captions(captions, text_to_video)[:_DUPLICATES]
    pairs: list[tuple[int, int]] = []
    interaction = INTERACTIONS[opened.config.model.interaction]
    if interaction.COMPARES_TOKENS and interaction.HAS_EXPLANATION:
        pairs = mapped_pairs(sim_matrix, ranks, [query.caption for query in worst])
    shown = [
        *(video for query in worst for video in (query.video, query.returned)),
        *(video for pair in confused for video in pair.videos),
        *hubs.hubs,
        *(video for same in duplicates for video in same.videos[:VIDEOS_OF_DUPLICATE]),
        *(video for _, video in pairs),
    ]
    frames = _read_frames(opened, shown)
    return ReportData(
        run=workdir.resolve().name,
        card=opened.card,
        metrics=evaluation.metrics,
        intervals=intervals(ranks),
        ranks=ranks,
        sim_matrix=sim_matrix,
        captions=captions,
        videos=[opened.dataset.video_ids[record] for record in split.videos],
        history=read_scalars(workdir),
        worst=worst,
        confused=confused,
        hubness=hubs,
        duplicates=duplicates,
        frames=frames,
        maps=_maps(evaluated, captions, pairs, frames),
        reranked=evaluated.results.get(RERANK),
        channels=_correlate(workdir, evaluated),
    )


def mapped_pairs(
    sim_matrix: np.ndarray, ranks: Ranks, worst: Iterable[int]
) -> list[tuple[int, int]]:
    """Chooses (caption, video) pairs whose words and frames are compared.

    Captions are evenly spaced in the split, then the `worst`; each has its own video and, where
    another one is first, that.
    """
    count = min(_SPACED_QUERIES, len(ranks.t2v))
    spaced = [number * len(ranks.t2v) // count for number in range(count)]
    pairs = []
    for caption in dict.fromkeys([*spaced, *list(worst)[:_WORST_QUERIES]]):
        pairs.append((caption, int(ranks.text_to_video[caption])))
        first = int(sim_matrix[caption].argmax())
        if ranks.t2v[caption] > 1 and first != pairs[-1][1]:
            pairs.append((caption, first))
    return pairs


def _read_frames(opened: OpenEvaluation, columns: Iterable[int]) -> dict[int, np.ndarray]:
    """Small frames of videos by column, in the order in which the model saw them."""
    order, found = opened.frame_order, {}
    columns = list(dict.fromkeys(columns))
    for column in tqdm(columns, "reading frames", unit="video", leave=False, disable=None):
        frames = opened.dataset.read_frames(opened.split.videos[column])
        side = min(_SIDE, frames.shape[1])
        found[column] = np.stack(
            [
                Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)
                for frame in (frames if order is None else order(frames))
            ]
        )
    return found


def _maps(
    evaluated: Evaluated,
    captions: list[str],
    pairs: list[tuple[int, int]],
    frames: dict[int, np.ndarray],
) -> list[WordFrameMap]:
    evaluation, config = evaluated.evaluation, evaluated.opened.config
    tokenizer = load_tokenizer(config.model)
    interaction = INTERACTIONS[config.model.interaction]
    maps = []
    for caption, video in pairs:
        tokens = tokenizer.tokenize([captions[caption]], config.data.max_words)
        (words,) = tokenizer.strings_of(tokens)
        attribution = interaction.attribution(
            _rows(evaluation.text, caption), _rows(evaluation.video, video)
        )
        maps.append(WordFrameMap(caption, video, words, attribution, frames[video]))
    return maps


def _rows(arrays: Features, rows: int | np.ndarray) -> Features:
    return {name: array[rows] for name, array in arrays.items()}


def _correlate(workdir: Path, evaluated: Evaluated) -> Channels | None:
    """Correlates the channels of videos and their first captions; None for xti, which has none."""
    opened, evaluation, *_ = evaluated
    config, split = opened.config, opened.split
    variant = config.loss.cdcr or INTERACTIONS[config.model.interaction].CDCR_VARIANTS[-1]
    if not variant:
        return None
    count = min(_PAIRS, len(split.videos))
    videos = np.arange(count) * len(split.videos) // count
    first_captions = np.searchsorted(evaluation.ranks.text_to_video, videos)
    pair = _rows(evaluation.text, first_captions), _rows(evaluation.video, videos)
    after = _correlation(config, opened.params, *pair, variant)
    try:
        params = remake_initial_params(workdir, config, make_layout(fsdp=config.sharding.fsdp))
    except UserError as error:
        return Channels(count, variant, after, None, str(error))
    captions = split.captions.subset(videos, first_only=True)
    part = Split(split.videos[videos], captions, np.zeros((0, 2), np.int32))
    untrained = opened.evaluator.run(params, part, frame_order=opened.frame_order)
    before = _correlation(config, params, untrained.text, untrained.video, variant)
    return Channels(count, variant, after, before)


def _correlation(
    config: Config, params: Params, text: Features, video: Features, variant: int
) -> np.ndarray:
    interaction = nnx.merge(model_definition(config.model), params).interaction
    key = jax.random.key(config.seed)
    return np.asarray(interaction.channel_correlation(text, video, key, variant))


def summary(correlation: np.ndarray) -> tuple[float, float]:
    """Mean of the diagonal, and mean magnitude of all else."""
    diagonal = np.diagonal(correlation)
    off_diagonal = np.abs(correlation).sum() - np.abs(diagonal).sum()
    return float(diagonal.mean()), float(off_diagonal / (correlation.size - len(diagonal)))
