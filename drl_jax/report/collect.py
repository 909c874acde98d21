"""Collects what a report shows; `page.py` renders it."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from drl_jax.evaluation.bootstrap import intervals
from drl_jax.evaluation.metrics import Ranks
from drl_jax.models.interactions import INTERACTIONS, Attribution
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.report.channels import Channels, correlate
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
from drl_jax.report.pictures import shrink
from drl_jax.runs.evaluate_run import Evaluated, OpenEvaluation
from drl_jax.runs.log_files import read_scalars
from drl_jax.runs.protocol_card import ProtocolCard

# Entries of each list of the page.
_WORST, _CONFUSED, _HUBS, _DUPLICATES = 12, 8, 8, 8
# Videos of a duplicate caption that are shown.
VIDEOS_OF_DUPLICATE = 3
# Captions whose words and frames are drawn: some that are evenly spaced, and the worst.
_SPACED_QUERIES, _WORST_QUERIES = 8, 4


class WordFrameMap(NamedTuple):
    """The interaction of the words of a caption with the frames of a video.

    Attributes:
      caption: row of the caption.
      video: column of the video.
      words: L tokens.
      attribution: of the L tokens and F frames.
      frames: uint8 [F, S, S, 3], small.
    """

    caption: int
    video: int
    words: list[str]
    attribution: Attribution
    frames: np.ndarray


@dataclasses.dataclass(frozen=True)
class ReportData:
    """What a report shows. Shapes: A captions, B videos.

    Attributes:
      run: name of the run.
      card: protocol of the evaluation.
      metrics: of `metrics.metrics_of`.
      intervals: their 95 % intervals.
      ranks: of all queries.
      sim_matrix: float32 [A, B].
      captions: A captions.
      videos: B ids.
      history: the scalars of the training by step (`metrics_file.read_scalars`); may be empty.
      worst: the captions with the largest ranks.
      confused: pairs of videos that are taken for each other.
      hubness: how often each video is returned.
      duplicates: captions of several videos.
      frames: small frames of the videos that are shown, uint8 [F, S, S, 3], by column.
      maps: words and frames of the chosen captions with their own video and, where another one is
        first, with that; empty for interactions that do not compare words with frames.
      channels: correlation of channels; None for interactions without it.
    """

    run: str
    card: ProtocolCard
    metrics: dict[str, Any]
    intervals: dict[str, Any]
    ranks: Ranks
    sim_matrix: np.ndarray
    captions: list[str]
    videos: list[str]
    history: list[dict[str, float]]
    worst: list[WrongQuery]
    confused: list[ConfusedPair]
    hubness: Hubness
    duplicates: list[Duplicate]
    frames: dict[int, np.ndarray]
    maps: list[WordFrameMap]
    channels: Channels | None


def collect(workdir: Path, evaluated: Evaluated) -> ReportData:
    """Collects the report of an evaluated checkpoint; reads frames, shows progress.

    Raises:
      UserError: frames cannot be read.
      OSError: `metrics.jsonl` cannot be read.
    """
    opened, evaluation = evaluated
    split = opened.split
    sim_matrix, ranks = evaluation.sim_matrix, evaluation.ranks
    text_to_video, captions = split.caption_pairs()
    worst = worst_queries(sim_matrix, text_to_video, ranks.t2v, _WORST)
    confused = confused_pairs(sim_matrix, text_to_video, _CONFUSED)
    hubs = hubness(sim_matrix, _HUBS)
    duplicates = duplicate_captions(captions, text_to_video)
    pairs: list[tuple[int, int]] = []
    if INTERACTIONS[opened.config.model.interaction].COMPARES_TOKENS:
        pairs = mapped_pairs(sim_matrix, ranks, [query.caption for query in worst])
    shown = [
        *(video for query in worst for video in (query.video, query.returned)),
        *(video for pair in confused for video in pair.videos),
        *hubs.hubs,
        *(v for same in duplicates[:_DUPLICATES] for v in same.videos[:VIDEOS_OF_DUPLICATE]),
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
        duplicates=duplicates[:_DUPLICATES],
        frames=frames,
        maps=_maps(evaluated, captions, pairs, frames),
        channels=correlate(workdir, evaluated),
    )


def mapped_pairs(
    sim_matrix: np.ndarray, ranks: Ranks, worst: Iterable[int]
) -> list[tuple[int, int]]:
    """Chooses captions, and the videos that their words are compared with.

    Args:
      sim_matrix: float [A, B].
      ranks: of all queries.
      worst: captions with the largest ranks.

    Returns:
      (caption, video) pairs: captions that are evenly spaced in the split, then the worst; each
      with its own video and, where another one is first, with that.
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
        found[column] = shrink(frames if order is None else order(frames))
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
        attribution = interaction.attribution(
            {name: array[caption] for name, array in evaluation.text.items()},
            {name: array[video] for name, array in evaluation.video.items()},
        )
        words = tokenizer.token_strings(tokens.text_ids[0][tokens.text_mask[0]])
        maps.append(WordFrameMap(caption, video, words, attribution, frames[video]))
    return maps
