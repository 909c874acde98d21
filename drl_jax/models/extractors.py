"""Features of one's own: another library's model makes them, and heads are trained on them."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from drl_jax.runtime.errors import UserError, one_line


class FeatureExtractor:
    """Makes the features of frames and of texts; a subclass is created without arguments.

    Features are used as they are, so they must not change from one call or process to another.

    Attributes:
      CHANNELS: D, of all features.
      IMAGE_SIZE: S, height and width of the frames that it gets.
      VERSION: of files that it loads; features that are stored with another one are not used.
    """

    CHANNELS: ClassVar[int]
    IMAGE_SIZE: ClassVar[int]
    VERSION: ClassVar[str] = ""

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        """RGB frames uint8 [N, S, S, 3] -> a feature of each, [N, D]."""
        raise NotImplementedError

    def encode_tokens(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        """Texts -> the features of the tokens of each, [L, D], at least one token."""
        raise NotImplementedError

    def encode_sentences(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> a feature of each, [A, D], which dp and xti compare; the mean of its tokens."""
        return np.stack([np.mean(tokens, axis=0) for tokens in self.encode_tokens(texts)])


# By `BackboneConfig.family`.
EXTRACTORS: dict[str, type[FeatureExtractor]] = {}


@functools.lru_cache(maxsize=4)
def _instance(cls: type[FeatureExtractor]) -> FeatureExtractor:
    return cls()


def frame_features(family: str, frames: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, 3] -> float32 [N, D]; UserError: the extractor gives something else."""
    return _checked(_call(family, "encode_frames", frames), len(frames), family, "encode_frames")


def text_features(family: str, texts: Sequence[str]) -> list[np.ndarray]:
    """The features of each of A texts: of the sentence and then of each token, float32 [1 + L, D].

    Those of a blank text are one token of zeros, without a call. UserError: the extractor fails, or
    gives something else.
    """
    found = [np.zeros((2, EXTRACTORS[family].CHANNELS), np.float32)] * len(texts)
    places = [place for place, text in enumerate(texts) if text.strip()]
    if not places:
        return found
    asked = [texts[place] for place in places]
    tokens = list(_call(family, "encode_tokens", asked))
    if len(tokens) != len(asked):
        raise UserError(f"{family}: encode_tokens gives {len(tokens)} arrays of {len(asked)} texts")
    tokens = [_checked(rows, None, family, "encode_tokens") for rows in tokens]
    sentences = _call(family, "encode_sentences", asked)
    sentences = _checked(sentences, len(asked), family, "encode_sentences")
    for place, sentence, rows in zip(places, sentences, tokens, strict=True):
        found[place] = np.concatenate([sentence[None], rows])
    return found


def _call(family: str, method: str, argument: Any) -> Any:
    try:
        return getattr(_instance(EXTRACTORS[family]), method)(argument)
    except Exception as error:
        raise UserError(f"{family}: {method} fails ({one_line(error)})") from error


def _checked(found: object, count: int | None, family: str, method: str) -> np.ndarray:
    """Features as float32 [count, D]; None: at least one row."""
    try:
        array = np.asarray(found, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{family}: {method} gives no numbers ({error})") from error
    channels, wanted = EXTRACTORS[family].CHANNELS, "L" if count is None else str(count)
    fits = array.ndim == 2 and array.shape[1] == channels
    if not fits or (len(array) != count if count is not None else not len(array)):
        raise UserError(f"{family}: {method} gives {array.shape}, not [{wanted}, {channels}]")
    if not np.isfinite(array).all():
        raise UserError(f"{family}: {method} gives values that are not finite")
    return array
