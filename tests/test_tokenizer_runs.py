"""Runs whose tokenizer is a file: they open where the original is not."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import TINY, error_of
from support.params import random_params
from support.runs import make_run, tiny_shapes_config
from support.tokenizer_files import write_gemma, write_spiece

import drl_jax
from drl_jax.convert import main as convert
from drl_jax.models.tokenizers import with_tokenizer
from drl_jax.runs.workdir import WorkdirError, claim_workdir, load_config
from drl_jax.runtime.files import seal
from drl_jax.train import main as train
from drl_jax.weights.weights_file import save_weights

CAPTIONS = ["a red circle moves left", "a dog"]
VOCABULARY = ("--config.model.backbone.vocab_size=400",)
CLEANING = ("--config.model.backbone.text_cleaning=lower",)


def with_file(config, file: Path):
    backbone = dataclasses.replace(
        config.model.backbone, vocab_size=400, text_cleaning="lower", pad_id=3
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    return with_tokenizer(config, str(file))


@pytest.fixture(scope="module")
def moved(shapes_config, tmp_path_factory):
    """A run in another place, without its original tokenizer, and what it gave before."""
    folder = tmp_path_factory.mktemp("moved")
    file = write_gemma(folder / "original.json")
    make_run(folder / "run", with_file(shapes_config, file))
    model = drl_jax.load(folder / "run")
    text = model.encode_text(CAPTIONS)
    (folder / "elsewhere").mkdir()
    (folder / "run").rename(folder / "elsewhere" / "run")
    file.unlink()
    return folder / "elsewhere" / "run", file, model, text


def test_a_moved_run_opens(moved):
    run, original, model, text = moved
    again = drl_jax.load(run)
    assert again.config.model.tokenizer == str(run / "tokenizer.json")
    stored = json.loads((run / "config.json").read_text())
    assert stored["model"]["tokenizer"] == str(original)
    assert again.fingerprint == model.fingerprint
    for name, array in again.encode_text(CAPTIONS).items():
        np.testing.assert_array_equal(array, text[name], err_msg=name)
    shown = again.token_strings(CAPTIONS)
    assert [words[-1] for words in shown] == ["[end]", "[end]"]
    assert [len(words) for words in shown] == text["text_mask"].sum(axis=1).tolist()


def test_the_tokenizer_is_part_of_the_fingerprint(moved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(moved[0], run)
    assert drl_jax.load(run).fingerprint == moved[2].fingerprint
    write_gemma(run / "tokenizer.json", template="<bos> $A <eos>")
    assert drl_jax.load(run).fingerprint != moved[2].fingerprint


def test_an_exported_run_has_its_tokenizer_beside_it(moved, tmp_path, capsys):
    run, _, model, text = moved
    target = tmp_path / "exported" / "drl.safetensors"
    for _ in range(2):  # The second time, it lies there.
        assert convert([str(run), str(target)]) == 0
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name, "tokenizer.json"]
    # Another one is not opened instead, nor replaced.
    write_spiece(target.parent / "spiece.model")
    target.parent.rename(tmp_path / "away")
    target = tmp_path / "away" / target.name
    exported = drl_jax.load(target)
    assert exported.fingerprint == model.fingerprint
    for name, array in exported.encode_text(CAPTIONS).items():
        np.testing.assert_array_equal(array, text[name], err_msg=name)
    assert convert([str(target), str(tmp_path / "imported")]) == 0
    assert load_config(tmp_path / "imported").model.tokenizer.endswith("imported/tokenizer.json")
    content = (target.parent / "tokenizer.json").read_bytes()
    (target.parent / "tokenizer.json").write_bytes(content + b"\n")
    line = error_of("drl_jax.convert", str(run), str(target), capsys=capsys)
    assert "is another tokenizer than the run's; export to another folder" in line
    (target.parent / "tokenizer.json").unlink()
    with pytest.raises(drl_jax.UserError, match=r"away/tokenizer\.json cannot be read: No such"):
        drl_jax.load(target)


def test_a_run_keeps_its_tokenizer(shapes_config, tmp_path):
    run, file = tmp_path / "run", write_gemma(tmp_path / "one.json")
    config = with_file(shapes_config, file)
    claim_workdir(run, config)
    copy = run / "tokenizer.json"
    written = copy.stat()
    assert copy.read_bytes() == file.read_bytes()
    claim_workdir(run, config)
    # From another place, and from its own copy.
    same = tmp_path / "same.json"
    shutil.copy(file, same)
    for path in (same, copy):
        claim_workdir(run, with_tokenizer(config, str(path)))
    assert (copy.stat().st_ino, copy.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    other = write_gemma(tmp_path / "other.json", template="<bos> $A <eos>")
    with pytest.raises(WorkdirError, match=r"other\.json is another file than .*tokenizer\.json"):
        claim_workdir(run, with_tokenizer(config, str(other)))
    for another in ("", str(write_spiece(tmp_path / "spiece.model"))):
        with pytest.raises(WorkdirError, match="holds a run with another tokenizer"):
            claim_workdir(run, with_tokenizer(config, another))
    copy.unlink()
    with pytest.raises(WorkdirError, match=r"lacks tokenizer\.json, its copy of .*; restore"):
        load_config(run)


def test_training_with_a_file(shapes_data, tmp_path, capsys):
    """A run without epochs, which is reproduced from its manifest."""
    file, weights = write_gemma(tmp_path / "one.json"), tmp_path / "tiny.safetensors"
    config = with_file(tiny_shapes_config(), file)
    save_weights(weights, random_params(config.model), with_tokenizer(config, ""))
    run = tmp_path / "run"
    arguments = (
        "--config=configs/shapes.py:smoke",
        f"--config.data.data_dir={shapes_data}",
        *TINY,
        *VOCABULARY,
        *CLEANING,
        f"--config.model.init={weights}",
        "--config.model.backbone.pad_id=3",
        "--config.train.epochs=0",
    )
    flag = f"--config.model.tokenizer={file}"
    assert train([*arguments, flag, f"--workdir={run}"]) == 0
    assert (run / "tokenizer.json").read_bytes() == file.read_bytes()
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["tokenizer_sha256"]) == 64

    line = error_of("drl_jax.train", *arguments, f"--workdir={tmp_path / 'none'}", capsys=capsys)
    assert "have a tokenizer of their own: put tokenizer.json or spiece.model" in line
    assert not (tmp_path / "none").exists()
    moved = tmp_path / "moved.json"
    file.rename(moved)
    again = (f"--reproduce={run / 'manifest.json'}", f"--workdir={tmp_path / 'again'}")
    line = error_of("drl_jax.train", *again, capsys=capsys)
    assert "one.json cannot be read: No such file" in line
    assert train([*again, f"--config.model.tokenizer={moved}"]) == 0
    assert "configuration, weights and dataset are the same" in capsys.readouterr().out
    other = f"--config.model.tokenizer={write_gemma(file, template='<bos> $A <eos>')}"
    for start in ((*arguments, f"--workdir={run}"), again):
        line = error_of("drl_jax.train", *start, other, capsys=capsys)
        assert "is not the tokenizer that the run" in line

    copy = run / "tokenizer.json"
    copy.write_bytes(copy.read_bytes() + b"\n")
    with pytest.raises(WorkdirError, match=r"tokenizer\.json is damaged or another file"):
        load_config(run)
    del manifest["tokenizer_sha256"], manifest["sha256"]
    (run / "manifest.json").write_text(json.dumps(seal(manifest)))
    assert load_config(run).model.tokenizer == str(copy)
