import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers
from support.commands import ROOT
from support.tokenizer_files import write_gemma, write_spiece, write_unigram

from drl_jax.config import BackboneConfig, ConfigError, ModelConfig
from drl_jax.models.tokenizers import (
    CLIPTokenizer,
    TokenizerError,
    load_tokenizer,
    tokenizer_beside,
    tokenizer_of_weights,
)
from drl_jax.models.tokenizers.files import canonicalize
from drl_jax.runtime.errors import UserError

CAPTIONS = ["a red circle moves left", "the dog", "", "a cat runs quickly " * 20]
CLIP = CLIPTokenizer()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "spiece": write_spiece(folder / "spiece.model"),
        "gemma": write_gemma(folder / "tokenizer.json"),
        "unigram": write_unigram(folder / "unigram.json"),
    }


def model_of(file, **changes) -> ModelConfig:
    fields = {"text_cleaning": "lower", "vocab_size": 500, "pad_id": 7, **changes}
    backbone = dataclasses.replace(BackboneConfig(), **fields)
    return ModelConfig(backbone=backbone, tokenizer=str(file))


def library_ids(file, text: str, length: int) -> list[int]:
    """What the packages themselves give, with the end at the last place."""
    if file.suffix == ".model":
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        return [*model.encode(text)[: length - 1], model.eos_id()]
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer.encode(text).ids


# ---------------------------------------------------------------- CLIP's


def test_known_ids():
    ids, mask, _ = CLIP.tokenize(["a photo of a cat"], 10)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0, 0, 0]
    assert mask[0].tolist() == [True] * 7 + [False] * 3


def test_a_long_caption_keeps_its_end_mark():
    ids, mask, _ = CLIP.tokenize(["dog " * 50, "dog"], 8)
    assert ids[0, 0] == 49406
    assert ids[0, -1] == 49407
    assert mask[0].all()
    assert mask[1].sum() == 3


@pytest.mark.parametrize("kind", ["clip", "spiece", "gemma", "unigram"])
def test_a_caption_with_just_enough_room_is_not_cut(files, kind):
    """The start and end tokens count."""
    tokenizer = CLIP if kind == "clip" else load_tokenizer(model_of(files[kind]))
    caption = "a red circle moves left"
    whole = tokenizer.tokenize([caption], 64)
    length = int(whole.text_mask.sum())
    fits = tokenizer.tokenize([caption, "", caption], length)
    assert fits.is_cut.tolist() == [False] * 3
    np.testing.assert_array_equal(fits.text_ids[0], whole.text_ids[0, :length])
    assert tokenizer.tokenize([caption, "", caption], length - 1).is_cut.tolist() == [1, 0, 1]


def test_tokens_as_text():
    ids, mask, _ = CLIP.tokenize(["a red dog!"], 12)
    assert CLIP.token_strings(ids[0][mask[0]]) == ["[start]", "a", "red", "dog", "!", "[end]"]
    ids, mask, _ = CLIP.tokenize(["it shrinks"], 12)
    assert CLIP.token_strings(ids[0][mask[0]]) == ["[start]", "it", "shrin-", "ks", "[end]"]


def test_cleaning_is_openais():
    ids, _, _ = CLIP.tokenize(["A  CAT &amp;amp; a\tdog", "a cat & a dog"], 12)
    np.testing.assert_array_equal(ids[0], ids[1])


def test_the_mask_is_not_a_guess_from_the_ids():
    ids, mask, _ = CLIP.tokenize(["!$", ""], 6)
    assert ids[0].tolist() == [49406, 0, 259, 49407, 0, 0]
    assert mask[0].tolist() == [True] * 4 + [False] * 2
    assert mask[1].sum() == 2


@pytest.mark.parametrize("family", ["clip", "pe"])
def test_two_families_have_clips_by_default(family):
    ids, _, _ = load_tokenizer(ModelConfig(BackboneConfig(family=family))).tokenize(CAPTIONS, 12)
    np.testing.assert_array_equal(ids, CLIP.tokenize(CAPTIONS, 12)[0])
    padded = load_tokenizer(ModelConfig(BackboneConfig(family=family, pad_id=9)))
    assert padded.tokenize(["a"], 5)[0].tolist() == [[49406, 320, 49407, 9, 9]]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["spiece", "gemma", "unigram"])
def test_ids_are_those_of_the_packages(files, kind):
    """Whole, truncated and empty, and without the padding and the truncation of the file."""
    tokenizer = load_tokenizer(model_of(files[kind]))
    for length in (6, 40):
        ids, mask, _ = tokenizer.tokenize(CAPTIONS, length)
        assert (ids.dtype, mask.dtype, ids.shape) == (np.int32, bool, (4, length))
        for row, caption in enumerate(CAPTIONS):
            expected = library_ids(files[kind], caption, length)
            assert ids[row].tolist() == expected + [7] * (length - len(expected)), caption
            assert mask[row].tolist() == [True] * len(expected) + [False] * (length - len(expected))
        assert mask.any(axis=1).all()
        assert mask[3].all()
        assert len(set(ids[np.arange(4), mask.sum(axis=1) - 1])) == 1  # the end token
    assert tokenizer.tokenize([], 5)[0].shape == (0, 5)


def test_canonical_text():
    assert canonicalize("  A_Red, DOG'S\t ball -- (jumps)!\n") == "a red dogs ball jumps"
    assert canonicalize("«Où?» ÉTÉ…") == "«où» été…"  # ASCII punctuation only
    assert canonicalize("!?_.") == ""


def test_captions_are_cleaned_before(files):
    lower, canonical = (
        load_tokenizer(model_of(files["spiece"], text_cleaning=cleaning))
        for cleaning in ("lower", "canonicalize")
    )
    plain = lower.tokenize(["a red dog"], 12)[0]
    np.testing.assert_array_equal(lower.tokenize(["A Red DOG"], 12)[0], plain)
    np.testing.assert_array_equal(canonical.tokenize(["  A_red, -- DOG!"], 12)[0], plain)
    assert (lower.tokenize(["a red, dog"], 12)[0] != plain).any()
    # Nothing is left of it.
    ids, mask, _ = canonical.tokenize(["!!!"], 12)
    assert ids[0, 0] == 1
    assert mask.sum() == 1
    # From a name that is not UTF-8.
    assert canonical.tokenize(["a red \udce9 dog"], 12)[0].tolist() == plain.tolist()


@pytest.mark.parametrize("kind", ["spiece", "gemma", "unigram"])
def test_tokens_of_files_as_text(files, kind):
    tokenizer = load_tokenizer(model_of(files[kind]))

    def strings(caption, length=24):
        ids, mask, _ = tokenizer.tokenize([caption], length)
        shown = tokenizer.token_strings(ids[0][mask[0]])
        assert len(shown) == mask.sum()
        return shown

    start = ["[start]"] if kind == "unigram" else []
    whole = strings("a red circle moves")
    assert whole[: len(start)] == start
    assert whole[-1] == "[end]"
    text = " ".join(whole[len(start) : -1]).replace("- ", "").replace("▁ ", "")
    assert text == "a red circle moves"
    assert strings("a red circle moves", len(start) + 3)[-1] == "[end]"
    assert strings("") == [*start, "[end]"]


def test_a_character_of_several_bytes_has_its_bytes_as_text(files):
    tokenizer = load_tokenizer(model_of(files["gemma"]))
    ids, mask, _ = tokenizer.tokenize(["dog é"], 12)
    shown = tokenizer.token_strings(ids[0][mask[0]])
    assert shown[0] == "dog"
    assert shown[-3:] == ["<0xC3>", "<0xA9>", "[end]"]


def test_a_file_is_parsed_once_until_it_changes(tmp_path, files):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(files["gemma"].read_bytes())
    first = load_tokenizer(model_of(path))
    assert load_tokenizer(model_of(path, image_resolution=64)) is first
    path.write_bytes(files["unigram"].read_bytes())
    assert load_tokenizer(model_of(path)).sha256 != first.sha256


# ---------------------------------------------------------------- refusals


def test_files_that_cannot_be_used_are_one_line(tmp_path, files):
    content = files["gemma"].read_bytes()
    # With this one, the package panics.
    lacking = json.loads(content)
    lacking["post_processor"]["special_tokens"] = {}
    broken = {
        "cut.json": content[: len(content) // 2],
        "empty.json": b"",
        "other.json": b'{"do_lower_case": true}',
        "panic.json": json.dumps(lacking).encode(),
        "cut.model": files["spiece"].read_bytes()[:5000],
        "empty.model": b"",
        "json.model": content,
    }
    for name, damaged in broken.items():
        (tmp_path / name).write_bytes(damaged)
        kind = "tokenizer.json" if name.endswith("json") else "SentencePiece model"
        with pytest.raises(TokenizerError, match=rf"{name} is not a {kind} \(.*\)"):
            load_tokenizer(model_of(tmp_path / name))
    for template in ("", "<bos> $A"):
        bare = write_gemma(tmp_path / "bare.json", template=template)
        with pytest.raises(TokenizerError, match="no post-processor that adds an end token"):
            load_tokenizer(model_of(bare))
    endless = write_spiece(tmp_path / "endless.model", eos_id=-1)
    with pytest.raises(TokenizerError, match="has no end token"):
        load_tokenizer(model_of(endless))
    with pytest.raises(UserError, match=r"none\.json cannot be read: No such file"):
        load_tokenizer(model_of(tmp_path / "none.json"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.json cannot be read: Is a directory"):
        load_tokenizer(model_of(tmp_path / "folder.json"))
    with pytest.raises(TokenizerError, match=r"vocab\.txt is neither a tokenizer\.json nor"):
        load_tokenizer(model_of(tmp_path / "vocab.txt"))


def test_configurations_that_do_not_go_with_the_tokenizer_are_one_line(files):
    gemma = files["gemma"]
    size = load_tokenizer(model_of(gemma)).vocabulary_size
    too_small = f"vocab_size={size - 1} is too small for .*{gemma}, which has {size} tokens"
    for model, message in (
        (model_of(gemma, vocab_size=size - 1), too_small),
        (ModelConfig(BackboneConfig(vocab_size=9)), "tokenizer of clip, which has 49408 tokens"),
        (model_of(gemma, pad_id=500), "pad_id=500 must be below"),
        (model_of(gemma, text_cleaning="clip"), "text_cleaning=clip is for CLIP's own tokenizer"),
        (
            model_of("", text_cleaning="lower"),
            "of their own: put tokenizer.json or spiece.model beside",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load_tokenizer(model)
    largest = tokenizers.Tokenizer.from_file(str(gemma)).get_vocab_size() - 1
    assert load_tokenizer(model_of(gemma, vocab_size=size)).vocabulary_size == largest + 1


@pytest.mark.parametrize(
    ("kind", "package"), [("gemma", "tokenizers"), ("spiece", "sentencepiece")]
)
def test_a_missing_package_is_one_line(files, kind, package, monkeypatch, tmp_path):
    path = tmp_path / files[kind].name
    path.write_bytes(files[kind].read_bytes())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TokenizerError, match=rf"\({package}\): pip install 'drl_jax\[siglip\]'"):
        load_tokenizer(model_of(path))


def test_the_packages_are_imported_when_a_file_is_opened():
    code = (
        "import sys, drl_jax, drl_jax.models.tokenizers\n"
        "assert not {'tokenizers', 'sentencepiece'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---------------------------------------------------------------- beside weights


def test_the_tokenizer_beside_weights_is_found(tmp_path):
    weights = tmp_path / "model.safetensors"
    assert tokenizer_beside(weights) == ""
    (tmp_path / "spiece.model").touch()
    assert tokenizer_beside(weights) == str(tmp_path / "spiece.model")
    (tmp_path / "tokenizer.json").touch()
    assert tokenizer_beside(weights) == str(tmp_path / "tokenizer.json")
    siglip = BackboneConfig(text_cleaning="lower")
    assert tokenizer_of_weights(weights, siglip) == str(tmp_path / "tokenizer.json")
    assert tokenizer_of_weights(weights, BackboneConfig()) == ""
    # An exported run has its own, whatever lies beside it.
    expected = str(tmp_path / "spiece.model")
    assert tokenizer_of_weights(weights, BackboneConfig(), "spiece.model") == expected
