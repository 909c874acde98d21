"""CLIP's byte-pair tokenizer.

Uses OpenAI's own `clip/simple_tokenizer.py` and its vocabulary from the PyPI package `openai-clip`.
The file is loaded by its path, because importing the package imports torch.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

VOCABULARY_SIZE = 49408
_VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


@functools.cache
def _simple_tokenizer():
    """OpenAI's SimpleTokenizer, created once per process (about 0.2 s).

    Raises:
      RuntimeError: the installed vocabulary is not OpenAI's.
    """
    package = importlib.metadata.distribution("openai-clip")
    source = Path(str(package.locate_file("clip/simple_tokenizer.py")))
    vocabulary = source.with_name("bpe_simple_vocab_16e6.txt.gz")
    if hashlib.sha256(vocabulary.read_bytes()).hexdigest() != _VOCABULARY_SHA256:
        raise RuntimeError(f"{vocabulary} is not OpenAI's vocabulary; reinstall openai-clip")
    spec = importlib.util.spec_from_file_location("drl_jax._openai_simple_tokenizer", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(str(vocabulary))


def tokenize(captions: Sequence[str], max_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes captions as the reference does.

    ids = BOS + BPE tokens, truncated to `max_words - 1` ids, + EOS, padded with 0. Text cleaning
    (ftfy, html-unescape twice, white space, lower case) is OpenAI's.

    Args:
      captions: N strings.
      max_words: L, the length of each row, BOS and EOS included.

    Returns:
      text_ids: int32 [N, L].
      text_mask: bool [N, L], True from BOS to EOS. Id 0 is also the token "!", so the ids do not
        determine the mask.
    """
    tokenizer = _simple_tokenizer()
    bos, eos = tokenizer.encoder["<|startoftext|>"], tokenizer.encoder["<|endoftext|>"]
    text_ids = np.zeros((len(captions), max_words), np.int32)
    text_mask = np.zeros((len(captions), max_words), bool)
    for row, caption in enumerate(captions):
        ids = [bos, *tokenizer.encode(caption)[: max_words - 2], eos]
        text_ids[row, : len(ids)] = ids
        text_mask[row, : len(ids)] = True
    return text_ids, text_mask


def token_strings(text_ids: np.ndarray) -> list[str]:
    """The text of each token id of a row, int [L].

    A word may have several tokens: a trailing "-" means the word continues. BOS and EOS are
    "[start]" and "[end]".
    """
    tokenizer = _simple_tokenizer()
    marks = {
        tokenizer.encoder["<|startoftext|>"]: "[start]",
        tokenizer.encoder["<|endoftext|>"]: "[end]",
    }
    strings = []
    for token in map(int, text_ids):
        text = tokenizer.decode([token])
        strings.append(marks.get(token) or (text.strip() if text.endswith(" ") else f"{text}-"))
    return strings
