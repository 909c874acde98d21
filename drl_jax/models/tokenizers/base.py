"""The interface of a tokenizer."""

import hashlib
import importlib.metadata
import json
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

# How `Tokenizer.token_strings` shows the tokens before and after a text.
START, END = "[start]", "[end]"


class Tokenizer:
    """Maps captions to token ids.

    Attributes:
      vocabulary_size: number of tokens; ids are below it.
      sha256: of the tokenizer's file; empty for CLIP's, which is always the same.
      pad_id: id after the last token.
    """

    vocabulary_size: int
    sha256: str = ""
    # Packages whose versions may change the ids.
    _PACKAGES: tuple[str, ...] = ()

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all that determines the ids of a caption, without the padding."""
        versions = {name: importlib.metadata.version(name) for name in self._PACKAGES}
        # Lower case and white space are those of Python's version of Unicode.
        parts = [self._identity(), versions, unicodedata.unidata_version]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def tokenize(self, captions: Sequence[str], max_words: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes captions.

        A caption that is too long loses its last words, and never its end token. An empty one has
        the end token, so every row has a valid token.

        Args:
          captions: N strings.
          max_words: L, the length of each row, at least 3; start and end tokens are included.

        Returns:
          text_ids: int32 [N, L], padded with `pad_id`.
          text_mask: bool [N, L], True from the first token to the end token. The padding may also
            be the id of a word, so the ids do not determine the mask.
        """
        text_ids = np.full((len(captions), max_words), self.pad_id, np.int32)
        text_mask = np.zeros((len(captions), max_words), bool)
        for row, ids in enumerate(self._encode(captions, max_words)):
            text_ids[row, : len(ids)] = ids
            text_mask[row, : len(ids)] = True
        return text_ids, text_mask

    def token_strings(self, text_ids: np.ndarray) -> list[str]:
        """The text of each token.

        A word may have several tokens: a trailing "-" means that the word continues.

        Args:
          text_ids: ids of one caption without its padding, int [L].

        Returns:
          L strings; start and end are START and END.
        """
        raise NotImplementedError

    def _identity(self) -> list[str]:
        """What distinguishes the tokenizer from those of other classes, files and settings."""
        raise NotImplementedError

    def _encode(self, captions: Sequence[str], max_words: int) -> Iterable[list[int]]:
        """The ids of each caption, at most `max_words`, with start and end."""
        raise NotImplementedError
