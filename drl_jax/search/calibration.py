"""How unusual a similarity is: compared with those of the same window to a bank of captions.

The similarity of a sentence and a video has no scale of its own: it depends on the model, and some
videos are similar to everything. An index therefore stores, for each window, the mean and the
standard deviation of its similarities to captions that were written for other videos.
"""

import numpy as np

from drl_jax.config import Config
from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel

# Name of the array of an index: mean and standard deviation, float32 [2] for each window.
BANK_ARRAY = "bank_similarity"
# Captions of a bank.
_BANK_SIZE = 64
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


def unusual(score: float, bank: np.ndarray) -> float:
    """By how many standard deviations a similarity is above the mean of the bank's.

    Args:
      score: similarity of a sentence and a window.
      bank: float32 [2], the row of BANK_ARRAY of the window.
    """
    mean, deviation = map(float, bank)
    return (score - mean) / max(deviation, 1e-6)
