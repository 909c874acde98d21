"""Weights as people keep them: wrapped, in parts, beside other things; or refused by name."""

import collections
import dataclasses
import json
import pickle
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.commands import error_of
from support.params import assert_same_arrays
from support.torch_files import Call, Global, stored, write
from support.towers import SIGLIP, tiny_state, to_hugging_face

import drl_jax
from drl_jax.hub.installed import path_of
from drl_jax.models.drl import model_definition
from drl_jax.models.reference_names import SIGLIP_HF, to_publisher
from drl_jax.runtime.errors import UserError
from drl_jax.weights.__main__ import main
from drl_jax.weights.load import config_of_weights, initial_params
from drl_jax.weights.source import weights_path, weights_sha256
from drl_jax.weights.weights_file import read_weights

TOWERS = tiny_state()
EXPECTED = {f"clip.{name}": tensor for name, tensor in TOWERS.items()}


def prefixed(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def read(path, key: str = ""):
    weights = read_weights(path, "openai", key)
    assert_same_arrays({n: np.asarray(t) for n, t in weights.state.items()}, EXPECTED)
    return weights


# ---------------------------------------------------------------- wrappers

PREFIXES = (
    *("module.", "model.", "clip_model.", "_orig_mod.", "module._orig_mod.", "state_dict.model."),
    "base_model.model.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("names", [dict, to_hugging_face], ids=["openai", "hugging face"])
def test_any_prefix_is_found(prefix, names, tmp_path):
    save_file(prefixed(prefix, names(TOWERS)), tmp_path / "a.safetensors")
    assert f"found under {prefix[:-1]}" in str(read(tmp_path / "a.safetensors").description)


@pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "legacy"])
def test_a_training_checkpoint_keeps_more_than_weights(is_legacy, tmp_path):
    """An optimiser with storages of its own, and values of classes that are not imported."""
    storages: list[bytes] = []
    state = stored(TOWERS, storages)
    namespace = Call(Global("argparse", "Namespace"))
    moments = stored({"exp_avg": np.ones(5, np.float32)}, storages)
    content = {
        "model_state_dict": collections.OrderedDict(prefixed("module.", state)),
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 0.1}]},
        "args": namespace,
        "config": Call(Global("omegaconf.dictconfig", "DictConfig"), {"a": 1}),
        "size": Call(Global("torch", "Size"), [1, 2]),
        "dtype": Global("torch", "float32"),
        "path": Call(Global("pathlib", "PosixPath"), "a", "b"),
        "best": Call(Global("numpy", "scalar"), Call(Global("_codecs", "encode"), "x", "latin1")),
        "options": Global("typing", "Any"),
        "epoch": 3,
    }
    write(tmp_path / "a.pt", content, storages, is_legacy=is_legacy)
    notes = str(read(tmp_path / "a.pt").description)
    assert (
        "found under model_state_dict.module; not used: 1 tensor: optimizer.state.0.exp_av" in notes
    )


class Module:
    """Pickles as an `nn.Module` of a class that is not imported, with parameters and modules."""

    def __init__(self, tensors: dict[str, Call]):
        groups: dict[str, dict] = {}
        for name, tensor in tensors.items():
            child, _, rest = name.partition(".")
            groups.setdefault(child, {})[rest] = tensor
        parameters = {name: group[""] for name, group in groups.items() if "" in group}
        modules = {name: Module(group) for name, group in groups.items() if "" not in group}
        self.state = {"_parameters": parameters, "_modules": modules, "training": True}

    def __reduce__(self):
        return Global("my_code", "Net"), (), self.state


def test_a_whole_model_is_read_without_its_class(tmp_path):
    storages: list[bytes] = []
    write(tmp_path / "model.pt", Module(stored(TOWERS, storages)), storages)
    read(tmp_path / "model.pt")
    write(tmp_path / "empty.pt", Module({}), [])
    with pytest.raises(UserError, match=r"no tensors, but a my_code\.Net; save the state_dict\(\)"):
        read(tmp_path / "empty.pt")


def test_two_pairs_of_towers(tmp_path, capsys):
    file = tmp_path / "a.safetensors"
    other = {name: np.asarray(tensor * 2) for name, tensor in TOWERS.items()}
    save_file(prefixed("model.", TOWERS) | prefixed("model_ema.", other), file)
    notes = str(read(file).description)
    assert "a moving average is under 'model_ema' (weights_key)" in notes
    assert f"not used: {len(TOWERS)} tensors: model_ema.* ({len(TOWERS)})" in notes
    save_file(prefixed("student.", TOWERS) | prefixed("teacher.", other), file)
    with pytest.raises(UserError, match="several pairs of towers, under 'student' and 'teacher'; "):
        read(file)
    read(file, "student")
    line = error_of("drl_jax.weights", str(file), "--weights_key=pupil", capsys=capsys)
    assert "has towers under 'student' and 'teacher', and the key is 'pupil'" in line
    found = read_weights(file, "openai", "teacher").state
    np.testing.assert_array_equal(found["clip.visual.proj"], 2 * TOWERS["visual.proj"])


def test_what_is_beside_the_towers_is_named_or_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    beside = {"classifier.weight": np.ones((3, 4), np.float32), "attn_mask": np.ones((2, 2))}
    save_file({**TOWERS, **beside, "visual.num_batches_tracked": np.array(3)}, file)
    names = "visual.num_batches_tracked, attn_mask, classifier.weight"
    assert f"not used: 3 tensors: {names}" in str(read(file).description)
    for name in (
        *("visual.ln_mid.weight", "transformer.resblocks.0.ls_1.gamma"),
        *("visual_projection.bias", "token_embedding.scale"),
    ):
        save_file({**TOWERS, name: np.ones(64, np.float32)}, file)
        with pytest.raises(UserError, match=f"has {name}, which a clip does not have: an adapter"):
            read(file)
    # Heads of other methods; the towers alone are what was asked for.
    save_file(EXPECTED | {"pool_frames.linear.weight": np.ones((4, 4), np.float32)}, file)
    weights = read_weights(file)
    config = config_of_weights(weights)
    assert config.data.max_words == 16  # 32, but for the positions of this tower
    with pytest.raises(UserError, match=r"pool_frames\.linear\.weight, .*weights_key=clip"):
        initial_params(config.model, weights, jax.random.key(0))
    read(file, "clip")


def test_what_changes_the_numbers_of_a_tensor_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    state = to_hugging_face(TOWERS)
    name = "vision_model.encoder.layers.0.self_attn.k_proj.weight"
    for other in (state[name][:, :1], state[name].astype(np.int8), state[name].reshape(-1)):
        save_file({**state, name: np.ascontiguousarray(other)}, file)
        with pytest.raises(UserError, match=f"has {name} of another shape or type"):
            read(file)
    save_file({**state, "visual_projection.lora_A": np.ones((2, 2), np.float32)}, file)
    with pytest.raises(UserError, match="is a LoRA adapter"):
        read(file)
    storages: list[bytes] = []
    tensors = stored(TOWERS, storages)
    rebuild, arguments = tensors["visual.proj"].call
    tensors["visual.proj"] = Call(rebuild, *arguments, {"neg": True})
    write(tmp_path / "a.pt", tensors, storages)
    with pytest.raises(UserError, match=r"has visual\.proj in the form of .* with metadata"):
        read(tmp_path / "a.pt")


def test_the_key_of_nested_pairs(tmp_path):
    """The exact prefix wins; "." is the top level; `clip` is found below a wrapper."""
    file = tmp_path / "a.safetensors"
    other = {name: np.asarray(tensor * 2) for name, tensor in TOWERS.items()}
    save_file(prefixed("model.", TOWERS) | prefixed("model.teacher.", other), file)
    read(file, "model")
    save_file(TOWERS | prefixed("teacher.", other), file)
    read(file, ".")
    head = {"model.pool_frames.weight": np.ones((4, 4), np.float32)}
    save_file(prefixed("model.clip.", TOWERS) | head, file)
    assert not read(file, "clip").has_heads


def test_scalars_may_be_vectors_of_one_element(tmp_path):
    state = {**TOWERS, "logit_scale": TOWERS["logit_scale"].reshape(1)}
    save_file(state, tmp_path / "a.safetensors")
    read(tmp_path / "a.safetensors")


# ---------------------------------------------------------------- containers


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights"])
def test_content_and_not_the_suffix_decides(name, tmp_path):
    save_file(TOWERS, tmp_path / name)
    read(tmp_path / name)
    storages: list[bytes] = []
    write(tmp_path / "a.safetensors", stored(TOWERS, storages), storages)
    read(tmp_path / "a.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A folder of Hugging Face with the weights in two parts."""
    folder = tmp_path / "model"
    folder.mkdir()
    state = to_hugging_face(TOWERS)
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    parts = {name: names[number % 2] for number, name in enumerate(state)}
    for part in names:
        held = {name: tensor for name, tensor in state.items() if parts[name] == part}
        save_file(held, folder / part)
    index = {"metadata": {"total_size": 1}, "weight_map": parts}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "clip", "vision_config": {"hidden_size": 64, "num_attention_heads": 1,
              "image_size": 32}, "text_config": {"num_attention_heads": 1}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_with_parts_is_one_model(folder):
    index = folder / "model.safetensors.index.json"
    for source in (folder, index):
        read(source)
    assert weights_path(folder) == index
    before = weights_sha256(folder)
    part = folder / "model-00002-of-00002.safetensors"
    with pytest.raises(UserError, match=r"one part of several; name model\.safetensors\.index\.j"):
        read(part)
    state = load_file(part)
    save_file({name: np.asarray(tensor * 2) for name, tensor in state.items()}, part)
    assert weights_sha256(folder) != before
    part.unlink()
    with pytest.raises(UserError, match=f"{part} cannot be read: No such file"):
        read(folder)


def test_a_folder_is_a_model_or_a_run(search_run, tmp_path):
    shutil.copy(path_of("shapes_clip"), tmp_path / "any name.safetensors")
    model = drl_jax.load(tmp_path)
    assert model.source == {"weights": str(tmp_path / "any name.safetensors")}
    assert drl_jax.load(search_run).source["workdir"] == str(search_run)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is damaged: it is not JSON"),
        ("{}", 'has no "weight_map"'),
        (
            '{"weight_map": {"a": "../a.safetensors"}}',
            "'../a.safetensors', which is no file beside",
        ),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "which it has not"),
    ],
)
def test_lists_that_cannot_be_used(index, message, folder):
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer .*git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page instead of the file"),
        (b"\x82\xaatext_model\x80\xacvision_model\x80", "is a msgpack file of Flax"),
        (b"\x89HDF\r\n", "is a Keras file"),
        (b'{"model_type": "clip"}', "is JSON: name the file of weights"),
        (pickle.dumps({"a": 1}), "is a pickle, but not of PyTorch"),
        (b"", "is damaged, or not a PyTorch or safetensors file"),
    ],
)
def test_other_files_are_named(content, message, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.safetensors")


# ---------------------------------------------------------------- refused by name


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["visual.cls_token", "text.positional_embedding"], "is an EVA-CLIP"),
        (["visual.conv1.weight", "bert.embeddings.word_embeddings.weight"], "as Chinese-CLIP"),
        (["text_model.roberta.embeddings.word_embeddings.weight"], "as AltCLIP"),
        (["visual_encoder.blocks.0.norm1.weight", "text_encoder.a.weight"], "is a BLIP"),
        (["visual.attn_pool.query", "text_decoder.a.weight"], "is a CoCa"),
        (["image_encoder.model.patch_embed.a.weight"], "is a MobileCLIP"),
        (["base_model.model.a.q_proj.lora_A.weight"], "is a LoRA adapter, which has to be merged"),
        (["visual.conv1.weight", "visual.proj"], "an image tower without a text tower"),
        (["token_embedding.weight"], "a text tower without an image tower"),
        (["blocks.0.norm1.weight", "pos_embed"], "no towers, but 2 tensors: blocks.0.norm1.w"),
    ],
)
def test_other_models_are_named(names, message, tmp_path):
    save_file(
        {name: np.ones((2, 3, 4, 4), np.float32) for name in names}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "a.safetensors")
    assert str(tmp_path / "a.safetensors") in str(error.value)


@pytest.mark.parametrize("rebuild", ["_rebuild_sparse_tensor", "_rebuild_tensor_v3"])
def test_tensors_that_are_not_dense_are_named(rebuild, tmp_path):
    storages: list[bytes] = []
    state = stored(TOWERS, storages)
    state["token_embedding.weight"] = Call(Global("torch._utils", rebuild), 1, 2)
    write(tmp_path / "a.pt", state, storages)
    with pytest.raises(
        UserError, match=f"has token_embedding.weight in the form of .*{rebuild}: sp"
    ):
        read(tmp_path / "a.pt")


def test_the_description_beside_weights_names_their_model(tmp_path):
    save_file({"a.weight": np.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "align"}')
    with pytest.raises(UserError, match=r"is of the type align, by the config\.json beside"):
        read(tmp_path)


# ---------------------------------------------------------------- what is used in bfloat16


def test_what_bfloat16_takes_nothing_from_stays_in_it():
    """Kernels are rounded before each product anyway: the same features from less memory."""
    weights = read_weights("shapes_clip")
    config = dataclasses.replace(config_of_weights(weights).model, dtype="bfloat16")
    ids, mask = np.ones((1, 8), np.int32), np.ones((1, 8), bool)
    frames = np.full((1, 1, 64, 64, 3), 90, np.uint8)

    @jax.jit
    def encode(params):
        model = nnx.merge(model_definition(config), params)
        return model.encode_text(ids, mask), model.encode_video(frames, mask[:, :1])

    found, sizes = [], []
    for for_use in (False, True):
        params = initial_params(config, weights, jax.random.key(0), for_use=for_use)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(params["backbone"]["visual"])))
        found.append(encode(params))
    assert sizes[1] < 0.6 * sizes[0]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------- the command


def test_the_command_says_what_a_file_is(tmp_path, capsys):
    save_file(prefixed("module.", TOWERS), tmp_path / "a.safetensors")
    assert main([str(tmp_path / "a.safetensors"), "--release=laion2b_s34b_b79k"]) == 0
    printed = capsys.readouterr().out
    for part in (
        f"{tmp_path / 'a.safetensors'}: safetensors, {len(TOWERS)} tensors, ",
        "clip, names of OpenAI, prefix module",
        "1 layers of 64 channels in 1 heads; 32 pixels (crop, bicubic) in patches of 16",
        "gelu (from the release laion2b_s34b_b79k)",
        "licence    MIT",
        "in float32",
    ):
        assert part in printed
    assert len(printed.splitlines()) <= 20
    # What is missing is said before anything large is read.
    siglip = to_publisher(tiny_state(**{**SIGLIP, "vocab_size": 32_000}), SIGLIP_HF)
    save_file(siglip, tmp_path / "siglip.safetensors")
    line = error_of("drl_jax.weights", str(tmp_path / "siglip.safetensors"), capsys=capsys)
    assert "put tokenizer.json or spiece.model beside the weights" in line
