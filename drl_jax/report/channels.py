"""Correlation of the channels of texts and videos, before and after a training.

It is what the channel decorrelation loss of the paper works on (CDCR, section 3.3): the diagonal
should be 1, all else 0. Variant 3 standardises the channels without the weights that it takes the
mean with, as the loss does, so a value can be above 1.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from drl_jax.config import Config
from drl_jax.data.splits import Split
from drl_jax.models.drl import Params, model_definition
from drl_jax.models.interactions import INTERACTIONS, Features
from drl_jax.runs.evaluate_run import Evaluated
from drl_jax.runs.run_params import remake_initial_params
from drl_jax.runtime.errors import UserError
from drl_jax.sharding import make_layout

# Most pairs of a caption and its video that a correlation is computed from.
_PAIRS = 512


@dataclasses.dataclass(frozen=True)
class Channels:
    """Cross-correlations of text and video channels.

    Attributes:
      pairs: number of pairs of a caption and its video.
      variant: of CDCR, which says what the correlated rows are (`config.loss.cdcr`).
      after: float32 [D, D], of the checkpoint.
      before: the same of the parameters that the run started from; None if they are not there.
      missing: why they are not.
    """

    pairs: int
    variant: int
    after: np.ndarray
    before: np.ndarray | None
    missing: str = ""


def correlate(workdir: Path, evaluated: Evaluated) -> Channels | None:
    """Correlates the channels of the first captions and their videos, before and after.

    Returns:
      None for an interaction whose channels cannot be compared.
    """
    opened, evaluation = evaluated
    config, split = opened.config, opened.split
    variant = config.loss.cdcr or INTERACTIONS[config.model.interaction].CDCR_VARIANTS[-1]
    if not variant:
        return None
    count = min(_PAIRS, len(split.videos))
    videos = np.arange(count) * len(split.videos) // count
    first_captions = np.searchsorted(evaluation.ranks.text_to_video, videos)
    after = _correlation(
        config,
        opened.params,
        _rows(evaluation.text, first_captions),
        _rows(evaluation.video, videos),
        variant,
    )
    try:
        params = remake_initial_params(workdir, config, make_layout(fsdp=config.sharding.fsdp))
    except UserError as error:
        return Channels(count, variant, after, None, str(error))
    part = Split(
        split.videos[videos],
        split.captions.subset(videos, first_only=True),
        np.zeros((0, 2), np.int32),
    )
    untrained = opened.evaluator.run(params, part, frame_order=opened.frame_order)
    before = _correlation(config, params, untrained.text, untrained.video, variant)
    return Channels(count, variant, after, before)


def _correlation(
    config: Config, params: Params, text: Features, video: Features, variant: int
) -> np.ndarray:
    interaction = nnx.merge(model_definition(config.model), params).interaction
    key = jax.random.key(config.seed)
    return np.asarray(interaction.channel_correlation(text, video, key, variant))


def _rows(arrays: Features, rows: np.ndarray) -> Features:
    return {name: array[rows] for name, array in arrays.items()}


def summary(correlation: np.ndarray) -> tuple[float, float]:
    """Mean of the diagonal, and mean magnitude of all else."""
    diagonal = np.diagonal(correlation)
    off_diagonal = np.abs(correlation).sum() - np.abs(diagonal).sum()
    return float(diagonal.mean()), float(off_diagonal / (correlation.size - len(diagonal)))
