"""CLIP's byte-pair tokenizer.

Uses OpenAI's own `clip/simple_tokenizer.py` and its vocabulary from the PyPI package `openai-clip`.
The file is loaded by its path, because importing the package imports torch.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from drl_jax.models.tokenizers.base import END, START, Tokenizer

_VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
# Ids in that vocabulary.
_START_ID, _END_ID = 49406, 49407


@functools.cache
def _simple_tokenizer():
    """OpenAI's SimpleTokenizer, created once per process (about 0.2 s)."""
    package = importlib.metadata.distribution("openai-clip")
    source = Path(str(package.locate_file("clip/simple_tokenizer.py")))
    vocabulary = source.with_name("bpe_simple_vocab_16e6.txt.gz")
    if hashlib.sha256(vocabulary.read_bytes()).hexdigest() != _VOCABULARY_SHA256:
        raise RuntimeError(f"{vocabulary} is not OpenAI's vocabulary; reinstall openai-clip")
    spec = importlib.util.spec_from_file_location("drl_jax._openai_simple_tokenizer", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(str(vocabulary))


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
            yield [_START_ID, *_simple_tokenizer().encode(caption), _END_ID]

    def token_strings(self, text_ids: np.ndarray) -> list[str]:
        marks = {_START_ID: START, _END_ID: END}
        strings = []
        for token in map(int, text_ids):
            text = _simple_tokenizer().decode([token])
            strings.append(marks.get(token) or (text.strip() if text.endswith(" ") else f"{text}-"))
        return strings
