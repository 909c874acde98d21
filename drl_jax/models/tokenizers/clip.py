"""CLIP's byte-pair tokenizer.

Uses OpenAI's own `clip/simple_tokenizer.py` and its vocabulary from the PyPI package `openai-clip`.
The file is loaded by its path, because importing the package imports torch.
"""

import builtins
import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from drl_jax.models.tokenizers.base import END, START, Tokenizer

_VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
# Ids in that vocabulary.
_START_ID, _END_ID = 49406, 49407


class _Ftfy:
    """What OpenAI's file takes from ftfy, whose import takes as long as all else here."""

    @staticmethod
    def fix_text(text: str) -> str:
        if _is_clean(text):
            return text
        import ftfy

        return ftfy.fix_text(text)


def _is_clean(text: str) -> bool:
    """Whether ftfy leaves a text as it is: of ASCII it changes HTML entities and what is not
    printable."""
    return text.isascii() and text.isprintable() and "&" not in text


def _import(name: str, *arguments: Any) -> Any:
    return _Ftfy if name == "ftfy" else __import__(name, *arguments)


@functools.cache
def _simple_tokenizer():
    """OpenAI's SimpleTokenizer, created once per process (about 0.1 s)."""
    package = importlib.metadata.distribution("openai-clip")
    source = Path(str(package.locate_file("clip/simple_tokenizer.py")))
    vocabulary = source.with_name("bpe_simple_vocab_16e6.txt.gz")
    if hashlib.sha256(vocabulary.read_bytes()).hexdigest() != _VOCABULARY_SHA256:
        raise RuntimeError(f"{vocabulary} is not OpenAI's vocabulary; reinstall openai-clip")
    spec = importlib.util.spec_from_file_location("drl_jax._openai_simple_tokenizer", source)
    module = importlib.util.module_from_spec(spec)
    vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(str(vocabulary))


@functools.lru_cache(maxsize=2**16)
def _ids(text: str) -> tuple[int, ...]:
    return tuple(_simple_tokenizer().encode(text))


class CLIPTokenizer(Tokenizer):
    """Tokenizes as the reference does: BOS + BPE tokens, truncated to L - 1 ids, + EOS.

    Text cleaning (ftfy, html-unescape twice, white space, lower case) is OpenAI's.
    """

    vocabulary_size = 49408
    _PACKAGES = ("openai-clip", "ftfy", "regex")
    _identity: ClassVar = ["clip", _VOCABULARY_SHA256]
    _end: ClassVar = [_END_ID]

    def _encode(self, captions: Sequence[str]) -> Iterator[list[int]]:
        for caption in captions:
            # No token has white space, and words repeat.
            texts = caption.split() if _is_clean(caption) else [caption]
            yield [_START_ID, *(n for text in texts for n in _ids(text)), _END_ID]

    def token_strings(self, text_ids: np.ndarray) -> list[str]:
        marks = {_START_ID: START, _END_ID: END}
        strings = []
        for token in map(int, text_ids):
            text = _simple_tokenizer().decode([token])
            strings.append(marks.get(token) or (text.strip() if text.endswith(" ") else f"{text}-"))
        return strings
