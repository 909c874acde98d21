"""Tokenizers: CLIP's, files of other towers, and runs that keep a copy of theirs."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from support.commands import TINY, error_of
from support.params import assert_same_arrays, random_params
from support.runs import make_run, tiny_shapes_config
from support.tokenizer_files import write_gemma, write_spiece, write_unigram

import drl_jax
from drl_jax.config import BackboneConfig, ConfigError, ModelConfig
from drl_jax.convert import main as convert
from drl_jax.models.tokenizers import (
    CLIPTokenizer,
    TokenizerError,
    clip,
    load_tokenizer,
    tokenizer_of_weights,
    with_tokenizer,
)
from drl_jax.models.tokenizers.files import canonicalize
from drl_jax.runs.weights_writer import save_weights
from drl_jax.runs.workdir import WorkdirError, claim_workdir, load_config
from drl_jax.runtime.errors import UserError
from drl_jax.train import main as train

CAPTIONS = ["a red circle moves left", "the dog", "", "a cat runs quickly " * 20]
CLIP = CLIPTokenizer()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "spiece": write_spiece(folder / "spiece.model"),
        "gemma": write_gemma(folder / "tokenizer.json"),
        "unigram": write_unigram(folder / "unigram.json"),
        "other": write_gemma(folder / "other.json", template="<bos> $A <eos>"),
    }


def model_of(file, **changes) -> ModelConfig:
    fields = {"text_cleaning": "lower", "vocab_size": 500, "pad_id": 7, **changes}
    return ModelConfig(backbone=BackboneConfig(**fields), tokenizer=str(file))


def library_ids(file, text: str, length: int) -> list[int]:
    """What the packages themselves give, with the end at the last place."""
    if file.suffix == ".model":
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        return [*model.encode(text)[: length - 1], model.eos_id()]
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer.encode(text).ids


# ---------------------------------------------------------------- ids and their text


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
        assert len(set(ids[np.arange(4), mask.sum(axis=1) - 1])) == 1  # the end token
    assert tokenizer.tokenize([], 5)[0].shape == (0, 5)


@pytest.mark.parametrize("kind", ["clip", "spiece", "unigram"])
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


def test_perception_encoder_has_clips_and_padding_may_be_another_token():
    backbone = BackboneConfig(family="pe", pad_id=9)
    padded = load_tokenizer(ModelConfig(backbone)).tokenize(["a"], 5)
    assert padded.text_ids.tolist() == [[49406, 320, 49407, 9, 9]]


def shown(tokenizer, caption: str, length: int = 24) -> list[str]:
    """The text of each token."""
    ids, mask, _ = tokenizer.tokenize([caption], length)
    return tokenizer.token_strings(ids[0][mask[0]])


def test_clips_ids_are_those_of_openais_tokenizer(monkeypatch):
    """Also of text that ftfy need not see: random texts of what its rules are about."""
    rng = np.random.default_rng(0)
    pieces = [
        *map(chr, range(32, 127)),
        "'s",
        "'LL",
        "<|startoftext|>",
        "dog",
        "10",
        "&amp;",
        "amp;",
    ]
    pieces += ["&#x27;", "é", "Ã©", "ﬁ", "“", "\t", "\r\n", "\x1b[31m", "\x7f", "  "]
    texts = ["".join(rng.choice(pieces, count)) for count in rng.integers(0, 12, 3000)]
    found = CLIP.tokenize(texts, 77)
    monkeypatch.setattr(clip, "_import", __import__)
    openais = clip._simple_tokenizer.__wrapped__()
    for text, ids, mask in zip(texts, found.text_ids, found.text_mask, strict=True):
        assert ids[mask].tolist()[1:-1] == openais.encode(text)[:75], text


def test_tokens_of_clip_as_text():
    expected = ["[start]", "it", "shrin-", "ks", ",", "a", "dog", "!", "[end]"]
    assert shown(CLIP, "it shrinks, a dog!") == expected


@pytest.mark.parametrize("kind", ["spiece", "gemma", "unigram"])
def test_tokens_of_files_as_text(files, kind):
    tokenizer = load_tokenizer(model_of(files[kind]))
    start = ["[start]"] if kind == "unigram" else []
    whole = shown(tokenizer, "a red circle moves")
    assert whole[: len(start)] == start
    assert whole[-1] == "[end]"
    text = " ".join(whole[len(start) : -1]).replace("- ", "").replace("▁ ", "")
    assert text == "a red circle moves"
    assert shown(tokenizer, "a red circle moves", len(start) + 3)[-1] == "[end]"
    assert shown(tokenizer, "") == [*start, "[end]"]


def test_a_character_of_several_bytes_has_its_bytes_as_text(files):
    found = shown(load_tokenizer(model_of(files["gemma"])), "dog é")
    assert found[0] == "dog"
    assert found[-3:] == ["<0xC3>", "<0xA9>", "[end]"]


def test_captions_are_cleaned_before(files):
    assert canonicalize("  A_Red, DOG'S\t ball -- (jumps)!\n") == "a red dogs ball jumps"
    assert canonicalize("«Où?» ÉTÉ…") == "«où» été…"  # ASCII punctuation only
    lower, canonical = (
        load_tokenizer(model_of(files["spiece"], text_cleaning=cleaning))
        for cleaning in ("lower", "canonicalize")
    )
    plain = lower.tokenize(["a red dog"], 12)[0].tolist()
    assert lower.tokenize(["A Red DOG"], 12)[0].tolist() == plain
    assert lower.tokenize(["a red, dog"], 12)[0].tolist() != plain
    # The last one is from a name that is not UTF-8.
    for caption in ("  A_red, -- DOG!", "a red \udce9 dog"):
        assert canonical.tokenize([caption], 12)[0].tolist() == plain
    # Nothing is left of it but the end.
    assert canonical.tokenize(["!?_."], 12).text_mask.sum() == 1


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
    (tmp_path / "folder.json").mkdir()
    for file, message in (
        (write_gemma(tmp_path / "a.json", template=""), "no post-processor that adds an end token"),
        (write_gemma(tmp_path / "b.json", template="<bos> $A"), "no post-processor that adds an"),
        (write_spiece(tmp_path / "endless.model", eos_id=-1), "has no end token"),
        (tmp_path / "none.json", r"none\.json cannot be read: No such file"),
        (tmp_path / "folder.json", r"folder\.json cannot be read: Is a directory"),
        (tmp_path / "vocab.txt", r"vocab\.txt is neither a tokenizer\.json nor"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(model_of(file))


def test_configurations_that_do_not_go_with_the_tokenizer_are_one_line(files):
    gemma = files["gemma"]
    size = load_tokenizer(model_of(gemma)).vocabulary_size
    assert load_tokenizer(model_of(gemma, vocab_size=size)).vocabulary_size == size
    too_small = f"vocab_size={size - 1} is too small for .*{gemma}, which has {size} tokens"
    for model, message in (
        (model_of(gemma, vocab_size=size - 1), too_small),
        (ModelConfig(BackboneConfig(vocab_size=9)), "tokenizer of clip, which has 49408 tokens"),
        (model_of(gemma, pad_id=500), "pad_id=500 must be below"),
        (model_of(gemma, text_cleaning="clip"), "text_cleaning=clip is for CLIP's own tokenizer"),
        (model_of(""), "of their own: put tokenizer.json or spiece.model beside"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_tokenizer(model)


@pytest.mark.parametrize(
    ("kind", "package"), [("gemma", "tokenizers"), ("spiece", "sentencepiece")]
)
def test_a_missing_package_is_one_line(files, kind, package, monkeypatch, tmp_path):
    path = shutil.copy(files[kind], tmp_path / files[kind].name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TokenizerError, match=rf"\({package}\): pip install 'drl_jax\[siglip\]'"):
        load_tokenizer(model_of(path))


# ---------------------------------------------------------------- beside weights and in runs


def test_the_tokenizer_beside_weights_is_found(tmp_path):
    weights, siglip = tmp_path / "model.safetensors", BackboneConfig(text_cleaning="lower")
    assert tokenizer_of_weights(weights, siglip) == ""
    for name in ("spiece.model", "tokenizer.json"):
        (tmp_path / name).touch()
        assert tokenizer_of_weights(weights, siglip) == str(tmp_path / name)
    assert tokenizer_of_weights(weights, BackboneConfig()) == ""
    # An exported run has its own, whatever lies beside it.
    expected = str(tmp_path / "spiece.model")
    assert tokenizer_of_weights(weights, BackboneConfig(), "spiece.model") == expected


def with_file(config, file: Path):
    fields = {"vocab_size": 400, "text_cleaning": "lower", "pad_id": 3}
    backbone = dataclasses.replace(config.model.backbone, **fields)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    return with_tokenizer(config, str(file))


@pytest.fixture(scope="module")
def moved(shapes_config, files, tmp_path_factory):
    """A run in another place, without its original tokenizer, and the model that it was before."""
    folder = tmp_path_factory.mktemp("moved")
    file = Path(shutil.copy(files["gemma"], folder / "original.json"))
    make_run(folder / "run", with_file(shapes_config, file))
    model = drl_jax.load(folder / "run")
    (folder / "elsewhere").mkdir()
    (folder / "run").rename(folder / "elsewhere" / "run")
    file.unlink()
    return folder / "elsewhere" / "run", file, model


def assert_same_texts(found, expected):
    assert found.fingerprint == expected.fingerprint
    assert_same_arrays(found.encode_text(CAPTIONS[:2]), expected.encode_text(CAPTIONS[:2]))


def test_a_moved_run_opens_and_its_tokenizer_is_part_of_its_fingerprint(moved, files, tmp_path):
    run, original, model = moved
    again = drl_jax.load(run)
    assert again.config.model.tokenizer == str(run / "tokenizer.json")
    stored = json.loads((run / "config.json").read_text())
    assert stored["model"]["tokenizer"] == str(original)
    assert_same_texts(again, model)
    changed = shutil.copytree(run, tmp_path / "run")
    shutil.copy(files["other"], changed / "tokenizer.json")
    assert drl_jax.load(changed).fingerprint != model.fingerprint


def test_an_exported_run_has_its_tokenizer_beside_it(moved, files, tmp_path, capsys):
    run, _, model = moved
    target = tmp_path / "exported" / "drl.safetensors"
    for _ in range(2):  # The second time, it lies there.
        assert convert([str(run), str(target)]) == 0
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name, "tokenizer.json"]
    # Another one is not opened instead, nor replaced.
    shutil.copy(files["spiece"], target.parent)
    target = target.parent.rename(tmp_path / "away") / target.name
    assert_same_texts(drl_jax.load(target), model)
    assert convert([str(target), str(tmp_path / "imported")]) == 0
    assert load_config(tmp_path / "imported").model.tokenizer.endswith("imported/tokenizer.json")
    beside = target.with_name("tokenizer.json")
    beside.write_bytes(beside.read_bytes() + b"\n")
    line = error_of("drl_jax.convert", str(run), str(target), capsys=capsys)
    assert "is another tokenizer than the run's; export to another folder" in line
    beside.unlink()
    with pytest.raises(drl_jax.UserError, match=r"away/tokenizer\.json cannot be read: No such"):
        drl_jax.load(target)


def test_a_run_keeps_its_tokenizer(shapes_config, files, tmp_path):
    run, config = tmp_path / "run", with_file(shapes_config, files["gemma"])
    claim_workdir(run, config)
    copy = run / "tokenizer.json"
    written = copy.stat()
    assert copy.read_bytes() == files["gemma"].read_bytes()
    # Again, from another place, and from its own copy.
    same = shutil.copy(files["gemma"], tmp_path / "same.json")
    for path in (files["gemma"], same, copy):
        claim_workdir(run, with_tokenizer(config, str(path)))
    assert (copy.stat().st_ino, copy.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    for another, message in (
        (files["other"], r"other\.json is another file than .*tokenizer\.json"),
        ("", "holds a run with another tokenizer"),
        (files["spiece"], "holds a run with another tokenizer"),
    ):
        with pytest.raises(WorkdirError, match=message):
            claim_workdir(run, with_tokenizer(config, str(another)))
    copy.unlink()
    with pytest.raises(WorkdirError, match=r"lacks tokenizer\.json, its copy of .*; restore"):
        load_config(run)


def test_training_with_a_file(shapes_data, files, tmp_path, capsys):
    """A run without epochs, which is reproduced from its manifest."""
    file, weights = tmp_path / "one.json", tmp_path / "tiny.safetensors"
    shutil.copy(files["gemma"], file)
    config = with_file(tiny_shapes_config(), file)
    save_weights(weights, random_params(config.model), with_tokenizer(config, ""))
    run = tmp_path / "run"
    arguments = (
        "--config=configs/shapes.py:smoke",
        f"--config.data.data_dir={shapes_data}",
        *TINY,
        f"--config.model.init={weights}",
        "--config.model.backbone.vocab_size=400",
        "--config.model.backbone.text_cleaning=lower",
        "--config.model.backbone.pad_id=3",
        "--config.train.epochs=0",
    )
    flag = "--config.model.tokenizer="
    assert train([*arguments, f"{flag}{file}", f"--workdir={run}"]) == 0
    copy = run / "tokenizer.json"
    assert copy.read_bytes() == file.read_bytes()
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["tokenizer_sha256"]) == 64

    line = error_of("drl_jax.train", *arguments, f"--workdir={tmp_path / 'none'}", capsys=capsys)
    assert "have a tokenizer of their own: put tokenizer.json or spiece.model" in line
    assert not (tmp_path / "none").exists()
    moved = file.rename(tmp_path / "moved.json")
    again = (f"--reproduce={run / 'manifest.json'}", f"--workdir={tmp_path / 'again'}")
    line = error_of("drl_jax.train", *again, capsys=capsys)
    assert "one.json cannot be read: No such file" in line
    assert train([*again, f"{flag}{moved}"]) == 0
    assert "configuration, weights and dataset are the same" in capsys.readouterr().out
    for start in ((*arguments, f"--workdir={run}"), again):
        line = error_of("drl_jax.train", *start, f"{flag}{files['other']}", capsys=capsys)
        assert "is not the tokenizer that the run" in line

    copy.write_bytes(copy.read_bytes() + b"\n")
    with pytest.raises(WorkdirError, match=r"tokenizer\.json is damaged or another file"):
        load_config(run)
