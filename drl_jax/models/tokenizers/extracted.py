"""The features of an extractor of one's own in place of token ids."""

from collections.abc import Sequence

import numpy as np

from drl_jax.models.extractors import text_features
from drl_jax.models.tokenizers.base import Tokenized, Tokenizer


class ExtractedTokens(Tokenizer):
    """Gives features instead of ids, which towers would make of them."""

    def __init__(self, family: str):
        super().__init__()
        self._family = family

    def tokenize(self, captions: Sequence[str], max_words: int) -> Tokenized:
        """As `Tokenizer.tokenize`, but `text_ids` are float32 [N, 1 + L, D].

        They are features of the sentence and then of each token (`DRL.text_features`).
        """
        found = text_features(self._family, captions)
        lengths = np.array([len(row) - 1 for row in found])
        text_ids = np.zeros((len(found), 1 + max_words, found[0].shape[1]), np.float32)
        for ids, row in zip(text_ids, found, strict=True):
            ids[: len(row)] = row[: 1 + max_words]
        text_mask = np.arange(max_words) < lengths[:, None]
        return Tokenized(text_ids, text_mask, lengths > max_words)

    def strings_of(self, tokens: Tokenized) -> list[list[str]]:
        """The numbers of the tokens: an extractor does not say what they are."""
        return [[f"{n + 1}" for n in range(mask.sum())] for mask in tokens.text_mask]
