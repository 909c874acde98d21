"""How unusual a similarity is: compared with others that mean nothing.

A similarity has no scale of its own: it depends on the model, and some videos are similar to
everything. That of a sentence and a window is compared with those of the same window to a bank of
captions that were written for other videos; an index stores their mean and standard deviation.
Captions say nothing about similarities to pictures and videos: those are compared with the
similarities of the same query to windows that are spread over the index.
"""

import numpy as np

from drl_jax.config import Config
from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel

# Name of the array of an index: mean and standard deviation, float32 [2] for each window.
BANK_ARRAY = "bank_similarity"
# Captions of a bank.
_BANK_SIZE = 64
# Windows that a query which is no sentence is compared with (`OpenIndex.spread`), and the fewest
# that make a scale.
SCALE_WINDOWS, _FEW = 64, 8
# Standard deviation of normal values whose median distance to their median is 1.
_DEVIATION = 1.4826
# A best moment that is less unusual than this many standard deviations is a weak match. Of the 200
# first captions of `shapes` (val), 99 % have more with their own clip.
WEAK = 2.5
# For models whose training captions are not at hand.
_SUBJECTS = ("a man", "a woman", "two children", "a dog", "a car", "a crowd", "a bird", "someone")
_ACTIONS = (
    "is talking to the camera",
    "is cooking food in a kitchen",
    "runs across a field",
    "is shown in a cartoon",
    "plays a musical instrument on a stage",
    "moves along a street at night",
    "is swimming in the sea",
    "sits at a table indoors",
)


def bank_of(config: Config) -> list[str]:
    """Captions of the training split of a model's dataset, or plain ones if it is not here."""
    # The libraries of datasets take half a second to import, and a query needs none.
    from drl_jax.data.batches import load_split
    from drl_jax.data.records import DatasetError, VideoDataset, dataset_dir

    try:
        captions = load_split(VideoDataset(dataset_dir(config)), "train", config.data).captions
    except DatasetError:
        return [f"{subject} {action}" for subject in _SUBJECTS for action in _ACTIONS]
    distinct = sorted({sentences[0] for sentences in captions if sentences})
    chosen = np.linspace(0, len(distinct) - 1, min(_BANK_SIZE, len(distinct)), dtype=int)
    return [distinct[row] for row in chosen]


def bank_similarity(model: RetrievalModel, bank: Features, windows: Features) -> np.ndarray:
    """Mean and standard deviation of the similarities of each window to a bank.

    Args:
      model: of the index.
      bank: arrays of the captions (`encode_text`).
      windows: arrays of W windows (`encode_videos`).

    Returns:
      float32 [W, 2].
    """
    similarity = model.similarity(bank, windows)
    return np.stack([similarity.mean(axis=0), similarity.std(axis=0)], axis=1)


def gallery_scale(scores: np.ndarray) -> np.ndarray | None:
    """The scale of a query that is no sentence, in the place of a row of BANK_ARRAY.

    Args:
      scores: of the query, with SCALE_WINDOWS windows or all of a smaller index. The windows that
        it looks for may be among them: they move neither the median nor the deviation.

    Returns:
      float32 [2], as `unusual` takes it; None if there are too few.
    """
    if len(scores) < _FEW:
        return None
    median = np.median(scores)
    deviation = _DEVIATION * np.median(np.abs(scores - median))
    return np.array([median, deviation], np.float32)


def unusual(score: float, scale: np.ndarray) -> float:
    """By how many standard deviations a similarity is above the mean.

    Args:
      score: of a query and a window.
      scale: float32 [2], mean and deviation: the row of BANK_ARRAY of the window for a sentence,
        `gallery_scale` for other queries.
    """
    mean, deviation = map(float, scale)
    return (score - mean) / max(deviation, 1e-6)
