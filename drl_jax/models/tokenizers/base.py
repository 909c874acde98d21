"""The interface of a tokenizer."""

import hashlib
import importlib.metadata
import json
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from drl_jax.runtime.errors import Notice

# How `Tokenizer.token_strings` shows the tokens before and after a text.
START, END = "[start]", "[end]"


class Tokenized(NamedTuple):
    """Token ids of N captions.

    Attributes:
      text_ids: int32 [N, L], padded with `Tokenizer.pad_id`.
      text_mask: bool [N, L], True from the first token to the end token. The padding may also be
        the id of a word, so the ids do not determine the mask.
      is_cut: bool [N], whether a caption has more than L tokens and lost its last words.
    """

    text_ids: np.ndarray
    text_mask: np.ndarray
    is_cut: np.ndarray


def warn_of_cut(cut: int, captions: int, max_words: int, where: str = "") -> None:
    """Issues one `Notice`, if captions (of `where`) were cut, for the caller of the caller."""
    if cut:
        text = (
            f"{where}{where and ': '}{cut:,} of {captions:,} captions cut to data.max_words="
            f"{max_words} tokens (start and end included): their last words are not read"
        )
        warnings.warn(text, Notice, stacklevel=3)


class Tokenizer:
    """Maps captions to token ids.

    Attributes:
      vocabulary_size: number of tokens; ids are below it.
      sha256: of the tokenizer's file; empty for CLIP's, which is always the same.
      pad_id: id after the last token.
    """

    vocabulary_size: int
    sha256: str = ""
    # What distinguishes the tokenizer from those of other classes, files and settings.
    _identity: list[str]
    # Ids after every text; there is at least one.
    _end: list[int]
    # Packages whose versions may change the ids.
    _PACKAGES: tuple[str, ...] = ()

    def __init__(self, pad_id: int = 0):
        self.pad_id = pad_id

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all that determines the ids of a caption, without the padding."""
        versions = {name: importlib.metadata.version(name) for name in self._PACKAGES}
        # Lower case and white space are those of Python's version of Unicode.
        parts = [self._identity, versions, unicodedata.unidata_version]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def tokenize(self, captions: Sequence[str], max_words: int) -> Tokenized:
        """Tokenizes captions.

        A caption that is too long loses its last words, and never its end token, which an empty one
        has, too. `max_words` is the length L of each row, at least 3, with start and end tokens.
        """
        text_ids = np.full((len(captions), max_words), self.pad_id, np.int32)
        text_mask = np.zeros((len(captions), max_words), bool)
        is_cut = np.zeros(len(captions), bool)
        for row, ids in enumerate(self._encode(captions)):
            if len(ids) > max_words:
                is_cut[row] = True
                ids = ids[: max_words - len(self._end)] + self._end
            text_ids[row, : len(ids)] = ids
            text_mask[row, : len(ids)] = True
        return Tokenized(text_ids, text_mask, is_cut)

    def strings_of(self, tokens: Tokenized) -> list[list[str]]:
        """The text of each token of N captions, as `token_strings`."""
        rows = zip(tokens.text_ids, tokens.text_mask, strict=True)
        return [self.token_strings(ids[mask]) for ids, mask in rows]

    def token_strings(self, text_ids: np.ndarray) -> list[str]:
        """The text of each token of a caption, int [L] without padding; with START and END.

        A word may have several tokens: a trailing "-" means that the word continues.
        """
        raise NotImplementedError

    def _encode(self, captions: Sequence[str]) -> Iterable[list[int]]:
        """All ids of each caption, with start and end."""
        raise NotImplementedError
