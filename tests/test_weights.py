"""Foreign files: read bit for bit, refused by name where they are wrong, and left as they came."""

import json
import os
import re
import shutil
import struct
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.numpy import save as safetensors
from support.commands import error_of
from support.files import refused
from support.golden import GOLDEN, SPEC, case_state, clip_state, clip_weights, load
from support.params import assert_same_arrays, random_params
from support.torch_files import Call, Global, write_zip
from support.torch_files import tensor as torch_tensor
from support.towers import to_hugging_face

import drl_jax
from data_prep.dataset_config import SHAPES_BACKBONE
from drl_jax.config import BackboneConfig, Config, DataConfig, ModelConfig
from drl_jax.convert import main as convert
from drl_jax.hub.installed import DIRECTORY, NAMES
from drl_jax.models.drl import param_shapes
from drl_jax.models.reference_names import state_dict_from_params
from drl_jax.runs.checkpoint_files import read_info
from drl_jax.runs.run_params import with_backbone_of
from drl_jax.runs.weights_writer import save_weights
from drl_jax.runs.workdir import load_config
from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.runtime.files import sha256
from drl_jax.weights import containers
from drl_jax.weights.containers import open_weights
from drl_jax.weights.errors import WeightsError
from drl_jax.weights.load import config_of_weights, params_from_state
from drl_jax.weights.weights_file import read_weights

WHOLE = "drl_wti_seqtransf.bin"


# The legacy file has the form of `torch.save`, which other publishers use, too.
@pytest.mark.parametrize(
    ("file", "release", "licence"),
    [("clip_torchscript.pt", "", ""), ("clip_legacy.pt", "openai", "MIT")],
)
def test_archives_of_clip_read_bit_for_bit(file, release, licence):
    weights = read_weights(GOLDEN / file, release)
    assert_same_arrays(weights.state, clip_state())
    assert weights.description.backbone.activation == "quick_gelu"
    assert weights.description.licence == licence


def test_a_drl_checkpoint_reads_bit_for_bit():
    weights = read_weights(GOLDEN / WHOLE)
    found = weights.state
    expected = case_state(SPEC["cases"]["wti_seqtransf_cdcr3"])
    assert_same_arrays(found, {name: expected[name] for name in found})
    model = config_of_weights(weights).model
    assert (model.interaction, model.wti_arch, model.agg_module) == ("wti", 2, "seqTransf")


# ---------------------------------------------------------------- damaged and dangerous files


def test_tensors_are_views_of_storages(tmp_path):
    write_zip(
        tmp_path / "good.pt", {"a": torch_tensor(), "b": torch_tensor(offset=5, size=(), stride=())}
    )
    found = open_weights(tmp_path / "good.pt").tensors
    np.testing.assert_array_equal(found["a"], [[0, 1, 2], [3, 4, 5]])
    assert found["b"].shape == ()
    assert np.asarray(found["b"]) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Call(os.system, "touch sentinel")}, r"posix\.system"),
        ({"a": Call(eval, "open('sentinel', 'w')")}, r"builtins\.eval|__builtin__\.eval"),
        ({"a": Global("torch", "load")}, r"torch\.load"),
        ({"a": Global("torch._utils", "os.system")}, r"torch\._utils\.os\.system"),
        ({"a": torch_tensor(offset=1)}, r"reaches element 6 of a storage of 6"),
        ({"a": torch_tensor(stride=(300, 1))}, "reaches element 302"),
        ({"a": torch_tensor(size=(2, 3), stride=(-3, 1))}, "stride"),
        ({"a": torch_tensor(size=(100000, 100000), stride=(0, 0))}, "overlaps itself"),
        ({"a": torch_tensor(numel=7)}, "has 24 bytes, not 7 elements"),
    ],
)
def test_unsafe_pickles_are_refused_by_name(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write_zip("bad.pt", content)
    with pytest.raises(WeightsError, match=message):
        open_weights(Path("bad.pt"))
    assert not Path("sentinel").exists()


@pytest.mark.parametrize("is_deep", [True, False])
def test_keys_that_cannot_be_hashed_are_left_out(is_deep, tmp_path):
    """A tuple in 100,000 others overflows the stack; one of 2^60 shared parts takes for ever."""
    parts = b"\x85" * 100_000 if is_deep else b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02})" + parts + b"K\x01s.")
    with pytest.raises(WeightsError, match=r"a\.pt holds no tensors"):
        read_weights(tmp_path / "a.pt")


def test_archives_that_hide_their_size_are_refused(tmp_path):
    write_zip(tmp_path / "bomb.pt", {"a": torch_tensor()}, [bytes(24)], zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="is compressed"):
        open_weights(tmp_path / "bomb.pt")
    write_zip(tmp_path / "good.pt", {"a": torch_tensor()})
    raw = bytearray((tmp_path / "good.pt").read_bytes())
    # The second entry of the central directory now points at the first entry's bytes.
    directory = [match.start() for match in re.finditer(b"PK\x01\x02", bytes(raw))]
    struct.pack_into("<I", raw, directory[1] + 42, 10)
    (tmp_path / "bad.pt").write_bytes(raw)
    with pytest.raises(WeightsError, match="overlaps another"):
        open_weights(tmp_path / "bad.pt")


FILES = ("clip_torchscript.pt", "clip_legacy.pt", WHOLE, "clip.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_refused(tmp_path, file):
    is_ours = file.endswith("safetensors")
    whole = safetensors(clip_state()) if is_ours else (GOLDEN / file).read_bytes()
    for kept in (0, 0.001, 0.5, 0.999):
        (tmp_path / file).write_bytes(whole[: int(len(whole) * kept)])
        with pytest.raises(WeightsError, match=file):
            open_weights(tmp_path / file)


def test_a_legacy_file_that_shrinks_while_it_is_opened_is_damaged(tmp_path, monkeypatch):
    file = Path(shutil.copy(GOLDEN / "clip_legacy.pt", tmp_path))
    load_pickle = containers.load_pickle

    def shrink(*arguments):
        os.truncate(file, 0)
        return load_pickle(*arguments)

    monkeypatch.setattr(containers, "load_pickle", shrink)
    with pytest.raises(WeightsError, match=r"clip_legacy\.pt is damaged"):
        open_weights(file)


# ---------------------------------------------------------------- accounting


def test_every_name_of_both_sides_is_accounted_for():
    backbone, state = clip_weights().description.backbone, clip_state()
    shapes = param_shapes(ModelConfig(backbone=backbone, interaction="dp", agg_module="none"))
    lacking = {name: t for name, t in state.items() if name != "clip.ln_final.bias"}
    for wrong, message in (
        (lacking, r"lack clip\.ln_final\.bias"),
        ({**state, "clip.extra": np.zeros(3)}, r"have clip\.extra, which the model does not have"),
        (
            {**state, "clip.text_projection": np.zeros((3, 5), np.float32)},
            r"clip\.text_projection is \(3, 5\) in the weights",
        ),
    ):
        with pytest.raises(WeightsError, match=message):
            params_from_state(wrong, shapes)


@pytest.mark.parametrize(
    ("name", "message"),
    [("visual.layer1.0.conv1.weight", "ResNet"), ("a", "holds no towers")],
)
def test_files_without_a_vit_are_refused(name, message, tmp_path):
    save_file({name: np.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("interaction", "arch", "agg_module"),
    [("dp", 2, "none"), ("wti", 1, "seqLSTM"), ("wti", 3, "seqTransf"), ("xti", 2, "none")],
)
def test_parameters_come_back_bit_for_bit(interaction, arch, agg_module):
    backbone = clip_weights().description.backbone
    model = ModelConfig(
        backbone=backbone, agg_module=agg_module, interaction=interaction, wti_arch=arch
    )
    shapes = param_shapes(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    state = state_dict_from_params(params)
    again = params_from_state(state, shapes)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    inferred = config_of_weights(clip_weights()._replace(state=state)).model
    assert (inferred.interaction, inferred.agg_module) == (interaction, agg_module)
    assert interaction != "wti" or inferred.wti_arch == arch


def test_hugging_face_names(tmp_path):
    save_file(to_hugging_face(load("clip")), tmp_path / "hf.safetensors")
    vision = {"hidden_size": SPEC["clip"]["vwidth"], "hidden_act": "gelu"}
    config = {"model_type": "clip", "vision_config": vision, "text_config": {"hidden_act": "gelu"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read_weights(tmp_path / "hf.safetensors")
    assert_same_arrays(weights.state, clip_state())
    assert weights.description.backbone.activation == "gelu"


# ---------------------------------------------------------------- installed weights


@pytest.mark.parametrize("name", NAMES)
def test_installed_weights_are_those_of_their_record(name):
    file = DIRECTORY / f"{name}.safetensors"
    record = json.loads(file.with_suffix(".json").read_text())
    assert record["sha256"] == sha256(file)
    assert record["bytes"] == file.stat().st_size <= 7_000_000
    assert len(record["commit"]) == 40
    assert record["command"].startswith("python -m benchmarks.")
    weights = read_weights(name)
    assert weights.config.seed == record["seed"]
    assert weights.config.model.backbone == SHAPES_BACKBONE
    assert sum(tensor.size for tensor in weights.state.values()) == record["parameters"]
    assert {tensor.dtype for tensor in weights.state.values()} == {np.dtype(np.float16)}
    (test,) = (row for row in record["rows"] if row["split"] == "test")
    assert test["t2v"]["R@1"] >= 70


@pytest.fixture
def installed_copy(tmp_path, monkeypatch):
    """A copy of the installed files that can be damaged."""
    copy = shutil.copytree(DIRECTORY, tmp_path / "files")
    monkeypatch.setattr("drl_jax.hub.installed.DIRECTORY", copy)
    return copy


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_installed_weights_that_cannot_be_read_are_not_called_damaged(suffix, installed_copy):
    path = installed_copy / f"shapes_clip.{suffix}"
    with refused(path), pytest.raises(Unavailable, match=f"{path} cannot be read: .*ELOOP"):
        read_weights("shapes_clip")


@pytest.mark.parametrize(
    ("suffix", "damage", "problem"),
    [
        ("safetensors", lambda content: None, "is missing"),
        ("json", lambda content: None, "is missing"),
        ("safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is damaged"),
        ("json", lambda content: b"[]", "is damaged"),
    ],
)
def test_unusable_installed_weights_are_one_line(
    installed_copy, tmp_path, suffix, damage, problem, capsys
):
    file = installed_copy / f"shapes_clip.{suffix}"
    damaged = damage(file.read_bytes())
    file.unlink()
    if damaged is not None:
        file.write_bytes(damaged)
    arguments = ("--config=configs/shapes.py:smoke", f"--workdir={tmp_path / 'run'}")
    line = error_of("drl_jax.train", *arguments, capsys=capsys)
    assert f"the weights shapes_clip cannot be used: {file} {problem}" in line
    assert "reinstall drl_jax" in line
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="shapes_clip cannot be used"):
        drl_jax.load("shapes_clip")


def test_sizes_that_weights_do_not_have_are_one_line(tmp_path, capsys):
    fields = ("text_width=128", "embed_dim=128")
    flags = [f"--config.model.backbone.{field}" for field in fields]
    arguments = ("--config=configs/shapes.py:smoke", f"--workdir={tmp_path / 'run'}", *flags)
    line = error_of("drl_jax.train", *arguments, capsys=capsys)
    assert "config.model.init=shapes_clip has other sizes than the configuration: " in line
    assert "embed_dim is 64, not 128, text_width is 64, not 128;" in line
    assert "or train from scratch with config.model.init=" in line
    assert not (tmp_path / "run").exists()


def test_default_sizes_are_replaced_by_those_of_the_weights():
    weights = read_weights("shapes_clip")
    data = DataConfig(holdout=1)
    for size in (224, 64):
        model = ModelConfig(backbone=BackboneConfig(image_resolution=size))
        found = with_backbone_of(Config(data=data, model=model), weights)
        assert found.model.backbone == SHAPES_BACKBONE


def test_a_directory_or_a_path_with_the_name_of_installed_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shapes_clip").mkdir()
    with pytest.raises(UserError, match="no run in shapes_clip"):
        drl_jax.load("shapes_clip")
    Path("shapes_clip").rmdir()
    with pytest.raises(UserError, match="no run in shapes_clip: there is no such directory"):
        drl_jax.load(Path("shapes_clip"))


# ---------------------------------------------------------------- the command


def test_convert_round_trips_bit_for_bit(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert convert([str(GOLDEN / WHOLE), str(first)]) == 0
    assert "interaction wti, agg_module seqTransf" in capsys.readouterr().out
    # Into a directory that does not exist yet.
    one, other = tmp_path / "new" / "a.safetensors", tmp_path / "b.safetensors"
    for source, target in ((first, one), (one, second), (second, other)):
        assert convert([str(source), str(target)]) == 0
    exported = load_file(one)
    original = read_weights(GOLDEN / WHOLE).state
    assert_same_arrays(exported, {n: np.asarray(t, np.float32) for n, t in original.items()})
    assert_same_arrays(load_file(other), exported)
    line = error_of("drl_jax.convert", str(GOLDEN / WHOLE), str(first), capsys=capsys)
    assert "already holds a run" in line


def test_an_exported_run_comes_back_as_the_same_model(search_run, search_model, tmp_path):
    """Head counts that are not width // 64, `max_words`, and the similarities."""
    file = tmp_path / "exported.safetensors"
    assert convert([str(search_run), str(file)]) == 0
    assert convert([str(file), str(tmp_path / "again")]) == 0
    again = load_config(tmp_path / "again")
    assert again.model.backbone == search_model.config.model.backbone
    assert (again.data.max_words, again.data.max_frames) == (24, 4)
    captions = ["a red circle moves to the left", "two words"]
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    exported = drl_jax.load(file)
    models = (search_model, exported, drl_jax.load(tmp_path / "again"))
    found = [m.similarity(m.encode_text(captions), m.encode_videos([frames])) for m in models]
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])
    # Whose it is, also where the run is not.
    owner = json.loads(open_weights(file).metadata["drl_jax_origin"])
    info = read_info(search_run / "checkpoints" / "0")
    names = ("step", "run", "config")
    assert {name: owner[name] for name in names} == {name: info[name] for name in names}
    assert f"(from the file, step 0 of run {owner['run']})" in exported.towers


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "config.json"])
def test_weights_that_cannot_be_read_are_not_called_damaged(name, shapes_config, tmp_path):
    weights = "weights.pt" if name.endswith("pt") else "weights.safetensors"
    (tmp_path / "config.json").write_text('{"family": "clip", "activation": "gelu"}')
    towers = {"backbone": random_params(shapes_config.model)["backbone"]}
    state = {n.removeprefix("clip."): t for n, t in state_dict_from_params(towers).items()}
    save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "weights.pt").write_bytes(b"PK")
    with (
        refused(tmp_path / name),
        pytest.raises(Unavailable, match=rf"{name} cannot be read: .*ELOOP.*nothing was moved"),
    ):
        read_weights(tmp_path / weights)


def test_a_stored_configuration_that_cannot_be_used_is_refused(shapes_config, tmp_path):
    state = state_dict_from_params(random_params(shapes_config.model))
    for stored in ("{", '{"seed": 1}'):
        save_file(state, tmp_path / "a.safetensors", metadata={"drl_jax_config": stored})
        with pytest.raises(
            WeightsError, match=r"a\.safetensors has a stored configuration that cannot"
        ):
            read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "the following arguments are required: OUT"),
        (["absent.pt", "out"], "absent.pt cannot be read: No such file"),
        (["README.md", "out"], "README.md is damaged, or not a PyTorch or safetensors file"),
        (["tests", "out"], "a run is exported to a file NAME.safetensors, not out"),
        (["tests", "out.safetensors"], "no run in tests"),
        (
            ["shapes_clip", "out", "--clip_only"],
            "and --adapter export a run, and shapes_clip is no",
        ),
        (
            ["shapes_clip", "out", "--dtype=float32"],
            "--clip_only and --adapter export a run, and sh",
        ),
    ],
)
def test_convert_mistakes_are_one_line(arguments, message, capsys):
    assert message in error_of("drl_jax.convert", *arguments, capsys=capsys)


def test_clip_is_exported_alone_under_its_own_names(search_run, search_model, tmp_path):
    file = tmp_path / "clip.safetensors"
    assert convert([str(search_run), str(file), "--clip_only", "--dtype=float16"]) == 0
    whole = read_weights(file)
    assert not whole.has_heads
    assert (whole.config.model.interaction, whole.config.model.agg_module) == ("dp", "none")
    expected = state_dict_from_params({"backbone": search_model.params["backbone"]})
    found = load_file(file)
    assert {f"clip.{name}" for name in found} == set(expected)
    for name, tensor in found.items():
        assert tensor.dtype == np.float16
        np.testing.assert_array_equal(tensor, expected[f"clip.{name}"].astype(np.float16))
    loaded = drl_jax.load(file)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))


def test_a_parameter_too_large_for_float16_is_refused(shapes_config, tmp_path):
    params = random_params(shapes_config.model)
    params["backbone"]["logit_scale"] = jnp.float32(1e6)
    with pytest.raises(
        WeightsError, match=r"clip.logit_scale is too large for float16; use float32"
    ):
        save_weights(tmp_path / "a.safetensors", params, shapes_config, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_an_export_that_cannot_be_written_is_one_line(search_run, tmp_path, capsys):
    (tmp_path / "file").write_text("not a directory")
    target = tmp_path / "file" / "out.safetensors"
    line = error_of("drl_jax.convert", str(search_run), str(target), capsys=capsys)
    assert f"{target.parent} cannot be written: File exists" in line
