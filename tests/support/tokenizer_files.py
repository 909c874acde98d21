"""Tokenizer files, trained in a moment on a few sentences."""

import random
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = (
    *("a", "the", "red", "green", "blue", "circle", "square", "triangle", "moves", "shrinks"),
    *("grows", "turns", "left", "right", "slowly", "quickly", "man", "dog", "cat", "runs"),
)


def sentences() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=8)) for _ in range(300)]


def write_spiece(path: Path, *, eos_id: int = 1, vocab_size: int = 60) -> Path:
    """A SentencePiece model with the special ids of SigLIP's: no start, end 1."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences()),
            model_writer=file,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            unk_id=0,
            bos_id=-1,
            eos_id=eos_id,
            pad_id=-1,
            minloglevel=2,
        )
    return path


def write_gemma(path: Path, *, template: str = "$A <eos>") -> Path:
    """A `tokenizer.json` as SigLIP 2's: BPE with bytes, an end, and padding on its left."""
    tokenizer = tokenizers.Tokenizer(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sentences(), trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<eos>", 1), ("<bos>", 2)]
        )
    tokenizer.enable_padding(direction="left", pad_id=3, length=64)
    tokenizer.enable_truncation(4, direction="left")
    tokenizer.save(str(path))
    return path


def write_unigram(path: Path) -> Path:
    """A `tokenizer.json` of another kind: Unigram, with a start and an end."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(path))
    return path
