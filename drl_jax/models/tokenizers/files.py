"""Tokenizers from a file: Hugging Face's `tokenizer.json`, and a SentencePiece model.

The packages `tokenizers` and `sentencepiece` are optional, and imported when a file is opened.
"""

import hashlib
import itertools
import string
from collections.abc import Sequence

import numpy as np

from drl_jax.models.tokenizers.base import END, START, Tokenizer
from drl_jax.runtime.errors import UserError, one_line

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# How SentencePiece writes a space.
_SPACE = "▁"


class TokenizerError(UserError):
    """A file of a tokenizer that is missing, damaged or cannot be used."""


def canonicalize(text: str) -> str:
    """Lower case without punctuation, as SigLIP's captions; "_" and white space are one space."""
    text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
    return " ".join(text.split())


# Functions of `BackboneConfig.text_cleaning`. CLIP's tokenizer cleans by itself.
CLEANINGS = {"none": str, "lower": str.lower, "canonicalize": canonicalize}


class FileTokenizer(Tokenizer):
    """What the tokenizers of both kinds of files share."""

    # Ids before every text.
    _start: list[int]

    def __init__(self, content: bytes, cleaning: str, pad_id: int):
        """Keeps the settings; a subclass parses the content. `cleaning` is a key of CLEANINGS.

        Raises:
          ImportError: the package that reads such files is not installed.
          TokenizerError: this is not such a file, or it adds no end token.
        """
        super().__init__(pad_id)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._identity = [type(self).__name__, self.sha256, cleaning]
        self._clean = CLEANINGS[cleaning]

    def _encode(self, captions: Sequence[str]) -> list[list[int]]:
        # Neither package takes the surrogates that Python makes of bytes that are not UTF-8.
        texts = [self._clean(text.encode("utf-8", "replace").decode()) for text in captions]
        return self._whole(texts) if texts else []

    def token_strings(self, text_ids: np.ndarray) -> list[str]:
        ids = [int(token) for token in text_ids]
        start, end = len(self._start), len(ids) - len(self._end)
        start = start if ids[:start] == self._start else 0
        end = end if ids[end:] == self._end else len(ids)
        words = _words(self._fragments(ids[start:end]))
        return [*([START] * start), *words, *([END] * (len(ids) - end))]

    def _whole(self, texts: list[str]) -> list[list[int]]:
        """The ids of each cleaned text, with start and end."""
        raise NotImplementedError

    def _fragments(self, ids: list[int]) -> list[str]:
        """The part of the text that each id stands for, with the spaces around words."""
        raise NotImplementedError


def _words(fragments: list[str]) -> list[str]:
    """Parts of a text without spaces; "-" marks a word that the next part continues."""
    words = []
    for fragment, following in itertools.pairwise([*fragments, ""]):
        continues = fragment[-1:].isalnum() and following[:1].isalnum()
        words.append((fragment.strip() or _SPACE) + "-" * continues)
    return words


class JSONTokenizer(FileTokenizer):
    """A `tokenizer.json`. Its post-processor adds start and end; its padding is not used."""

    _PACKAGES = ("tokenizers",)

    def __init__(self, content: bytes, cleaning: str, pad_id: int):
        import tokenizers

        super().__init__(content, cleaning, pad_id)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            special = self._tokenizer.encode("a").special_tokens_mask
            around = self._tokenizer.encode("").ids
            self.vocabulary_size = max(self._tokenizer.get_vocab().values()) + 1
        # A panic of the Rust code is not an Exception.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise TokenizerError(f"is not a tokenizer.json ({one_line(error)})") from error
        if 0 not in special:
            raise TokenizerError('has no token for the letter "a"')
        before = special.index(0)
        self._start, self._end = around[:before], around[before:]
        if not self._end:
            raise TokenizerError(
                "has no post-processor that adds an end token to a text; take the file that was"
                " published with the weights"
            )

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def _fragments(self, ids: list[int]) -> list[str]:
        # Files mark spaces and bytes in several ways, and each has the decoder for its own. A token
        # is what it adds to the decoded text.
        fragments, before = [], ""
        for count, token in enumerate(ids, start=1):
            text = self._tokenizer.decode(ids[:count], skip_special_tokens=False)
            added = text.removeprefix(before) if text.startswith(before) else "\ufffd"
            # A part of a character has no text.
            is_text = added and "\ufffd" not in added
            fragments.append(added if is_text else self._tokenizer.id_to_token(token) or "")
            before = text
        return [fragment.replace(_SPACE, " ") for fragment in fragments]


class SentencePieceTokenizer(FileTokenizer):
    """A SentencePiece model, e.g. SigLIP's `spiece.model`; the end token follows the text."""

    _PACKAGES = ("sentencepiece",)

    def __init__(self, content: bytes, cleaning: str, pad_id: int):
        import sentencepiece

        super().__init__(content, cleaning, pad_id)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except (RuntimeError, ValueError, OSError) as error:
            raise TokenizerError(f"is not a SentencePiece model ({one_line(error)})") from error
        self.vocabulary_size = self._model.get_piece_size()
        if self._model.eos_id() < 0:
            raise TokenizerError("has no end token (eos); take the file published with the weights")
        self._start, self._end = [], [self._model.eos_id()]

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return [ids + self._end for ids in self._model.encode(texts)]

    def _fragments(self, ids: list[int]) -> list[str]:
        return [self._model.id_to_piece(token).replace(_SPACE, " ") for token in ids]
