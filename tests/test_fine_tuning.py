"""Fine-tuning: what is trained, adapters, averages and interpolation."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from support.commands import error_of
from support.finished_runs import metrics
from support.params import assert_same_arrays, random_batch, random_params

from drl_jax.config import Config, ConfigError, DataConfig, LoRAConfig, LossConfig, OptimConfig
from drl_jax.convert import main as convert
from drl_jax.evaluate import main as evaluate
from drl_jax.evaluation.embedder import make_embed_steps
from drl_jax.models.drl import config_from_dict, init_params, param_shapes
from drl_jax.models.linear import ADAPTER, merge_adapters, without_adapters
from drl_jax.runs import interpolation
from drl_jax.runs.hooks import TrainLog
from drl_jax.runs.run_params import restore_params
from drl_jax.runs.workdir import load_config
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import sha256
from drl_jax.runtime.sharding import make_layout
from drl_jax.train import main as train
from drl_jax.training.flops import train_step_flops
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import make_gradient, make_train_step, state_from_params
from drl_jax.training.trainable import Trainable

B, L, F, SIZE = 4, 8, 2, 32
LOSS = LossConfig(cdcr_lambda=0.1)
HEADS = "temporal,interaction,logit_scale"


@pytest.fixture(scope="module")
def model(tiny_model):
    backbone = dataclasses.replace(
        tiny_model.backbone, vocab_size=500, image_resolution=SIZE, vision_layers=3
    )
    return dataclasses.replace(tiny_model, backbone=backbone, temporal_layers=1)


def optim_of(trainable, **others):
    return OptimConfig(lr=1e-3, coef_lr=1.0, trainable=trainable, **others)


def run(model, optim, params, steps=3, start=None):
    """The states after each step; `start` continues one."""
    layout = make_layout(jax.devices()[:1])
    tx = make_optimizer(optim, 20)
    step = make_train_step(model, LOSS, tx, layout, trainable=Trainable.of(optim))
    state = state_from_params(params, tx, layout) if start is None else start
    states = []
    for _ in range(steps):
        state, _ = step(state, layout.put_batch(random_batch(B, L, F, SIZE)))
        states.append(jax.device_get(state))
    return states


def changed(before, after):
    """Paths of the parameters that differ; of stacks, with the layers that do."""
    before, after = flatten_dict(before), flatten_dict(after)
    found = {}
    for path, old in before.items():
        if np.any(different := after[path] != old):
            rows = different.reshape(len(old), -1).any(axis=1) if "resblocks" in path else ()
            found["/".join(map(str, path))] = np.flatnonzero(rows).tolist()
    return found


# ---------------------------------------------------------------- what is trained


def test_frozen_layers_and_towers_stay_and_have_no_moments(model):
    optim = optim_of(f"image@2=0.5,{HEADS}")
    params = random_params(model)
    state = run(model, optim, params)[-1]
    moved = changed(params, state.params)
    own = {name for name in moved if name.startswith("backbone")} - {"backbone/logit_scale"}
    tower = "backbone/visual/"
    assert own >= {tower + "ln_post/scale", tower + "proj"}
    assert all(name.startswith(tower) for name in own)
    kernels = [layers for name, layers in moved.items() if "visual/transformer" in name]
    assert len(kernels) >= 10
    assert all(layers == [2] for layers in kernels)
    moments = flatten_dict(state.opt_state[1].mu)
    assert {path[0] for path in moments} == {"backbone", "temporal", "interaction"}
    assert ("backbone", "token_embedding", "embedding") not in moments
    in_proj = ("backbone", "visual", "transformer", "resblocks", "attn", "in_proj", "kernel")
    assert moments[in_proj].shape[0] == 1


@functools.cache
def compiled_gradient(model, trainable, microbatch):
    layout = make_layout(jax.devices()[:1])
    gradient = make_gradient(model, LOSS, layout, trainable, microbatch)
    return jax.jit(layout.on_mesh(gradient, "float32"))


def gradient_of(model, optim, params, *, key=1, microbatch=0):
    trainable, layout = Trainable.of(optim), make_layout(jax.devices()[:1])
    gradient = compiled_gradient(model, trainable, microbatch)
    batch = layout.put_batch(random_batch(B, L, F, SIZE))
    return jax.device_get(gradient(*trainable.split(params), batch, jax.random.key(key))[0])


def test_a_trained_part_has_the_gradient_of_the_whole(model):
    params, optim = random_params(model), optim_of(f"image@1,{HEADS}")
    whole = flatten_dict(gradient_of(model, optim_of(""), params))
    for path, found in flatten_dict(gradient_of(model, optim, params)).items():
        expected = whole[path][1:] if found.shape != whole[path].shape else whole[path]
        bound = 1e-5 * max(np.abs(expected).max(), 1e-2)
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=str(path))


def test_factors_multiply_updates_and_those_of_layers_decay(model):
    params, rest = random_params(model), "image,text,embeddings,temporal,interaction,logit_scale"

    def updates(groups, **others):
        optim = optim_of(groups, warmup_proportion=0.0, max_grad_norm=1e9, **others)
        tx = make_optimizer(optim, 20)
        grads = jax.tree.map(np.ones_like, Trainable.of(optim).split(params)[0])
        return flatten_dict(jax.jit(tx.update)(grads, tx.init(params), params)[0])

    whole, part = updates(""), updates(f"{rest},image@1=0.25,text=0")
    decayed = updates("", layer_decay=0.5)
    assert {path[1] for path in part if path[0] == "backbone"} == {"visual", "logit_scale"}
    for path, expected in whole.items():
        factor, decay = np.ones(expected.shape), np.ones(expected.shape)
        if path[:2] == ("backbone", "visual") and "resblocks" in path:
            factor[1:] = 0.25
            decay *= np.reshape([0.125, 0.25, 0.5], (3, *[1] * (expected.ndim - 1)))
        elif path[:2] == ("backbone", "visual"):
            is_after = path[2] in ("ln_post", "proj")
            factor, decay = (0.25, 1.0) if is_after else (1.0, 0.5**4)
        elif path[0] == "backbone":
            decay = decayed[path] / expected
        np.testing.assert_allclose(decayed[path], decay * expected, rtol=1e-6)
        if path in part:
            np.testing.assert_allclose(part[path], factor * expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("groups", "rank", "stored", "most"),
    [
        ("", 0, False, 1.0),
        ("temporal,interaction", 0, False, 0.45),
        ("image@1,temporal", 0, False, 0.6),
        ("", 4, False, 0.8),
        ("temporal,interaction", 0, True, 0.2),
    ],
)
def test_the_count_of_work_and_memory_is_the_measured_one(model, groups, rank, stored, most):
    """Of the compiled gradient without loops, whose products are nearly all of its work."""
    backbone = dataclasses.replace(
        model.backbone, vision_width=256, text_width=256, embed_dim=256, vision_layers=2
    )
    whole = dataclasses.replace(model, backbone=backbone, scan_unroll=2, remat="none")
    model = dataclasses.replace(whole, lora=LoRAConfig(rank=rank))
    trainable = Trainable.of(optim := optim_of(groups))
    expected = train_step_flops(model, LOSS, B, F, L, trainable, stored)
    layout, shapes = make_layout(jax.devices()[:1]), param_shapes(model)
    gradient = jax.jit(layout.on_mesh(make_gradient(model, LOSS, layout, trainable), "float32"))
    trained, frozen = jax.eval_shape(trainable.split, shapes)
    batch = jax.eval_shape(lambda: random_batch(B, L, F, SIZE))
    if stored:
        for name, rows in (("text_ids", 1 + L), ("frames", F)):
            batch[name] = jax.ShapeDtypeStruct((B, rows, backbone.embed_dim), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = gradient.lower(trained, frozen, batch, key).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.1)
    moments = jax.eval_shape(make_optimizer(optim, 20).init, shapes)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (moments, trained)]
    assert 2 * sizes[1] <= sizes[0] <= 2 * sizes[1] + 4
    assert expected <= most * train_step_flops(whole, LOSS, B, F, L)


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapted(model):
    """The model with adapters, of dropout 0.5; and its parameters, of which B is not 0."""
    lora = LoRAConfig(rank=2, alpha=6.0, dropout=0.5)
    config = dataclasses.replace(model, lora=lora)
    flat = flatten_dict(random_params(config))
    # Changes of the size that training makes.
    small = {path: 0.02 * leaf for path, leaf in flat.items() if path[-1] == "lora_b"}
    return config, unflatten_dict(flat | small)


def similarities(model, params):
    steps = make_embed_steps(model, make_layout(jax.devices()[:1]))
    batch = random_batch(B, L, F, SIZE)
    text = steps.encode_text(params, batch["text_ids"], batch["text_mask"])
    video = steps.encode_video(params, batch["frames"], batch["frame_mask"])
    return np.asarray(steps.similarity(params, text, video))


def test_an_adapter_changes_nothing_at_the_start_and_merges_at_the_end(model, adapted):
    config, params = adapted
    base = without_adapters(params)
    plain = similarities(model, base)
    new = init_params(config, jax.random.key(0), base["backbone"])
    adapters = {path for path in flatten_dict(new) if path[-1] in ADAPTER}
    assert len(adapters) == 2 * 4 * 2
    started = {**base, "backbone": new["backbone"]}
    np.testing.assert_array_equal(similarities(config, started), plain)
    found = similarities(config, params)
    assert np.abs(found - plain).max() > 1e-3
    merged = merge_adapters(params, config.lora.scale)
    np.testing.assert_allclose(similarities(model, merged), found, rtol=0, atol=1e-6)


def test_adapters_and_heads_alone_are_trained_with_dropout(model, adapted):
    config, params = adapted
    trained = flatten_dict(Trainable.of(optim_of("")).split(params)[0])
    assert {path[0] for path in trained} == {"backbone", "temporal", "interaction"}
    own = [path for path in trained if path[0] == "backbone"]
    assert len(own) == 2 * 4 * 2 + 1
    assert all(path[-1] in (*ADAPTER, "logit_scale") for path in own)
    optim = optim_of("lora")
    gradients = [
        flatten_dict(gradient_of(config, optim, params, key=key, microbatch=micro))
        for key, micro in ((1, 0), (1, 0), (2, 0), (1, 2))
    ]
    path = ("backbone", "transformer", "resblocks", "mlp", "c_fc", "lora_b")
    first, again, other, in_parts = (gradient[path] for gradient in gradients)
    np.testing.assert_array_equal(again, first)
    assert np.abs(other - first).max() > 1e-6
    assert np.isfinite(in_parts).all()
    assert np.abs(in_parts - first).max() > 1e-6


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 33}, "model.lora.rank=33 is above the width of a tower, 32"),
        ({"rank": 2, "targets": "qkv"}, "model.lora.targets=qkv must be some of in_proj"),
        ({"rank": 2, "dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_adapters_that_cannot_be(model, lora, message):
    config = dataclasses.replace(model, lora=LoRAConfig(**lora))
    with pytest.raises(ConfigError, match=message):
        config_from_dict(dataclasses.asdict(Config(model=config, data=DataConfig(holdout=2))))


# ---------------------------------------------------------------- averages


def test_the_average_of_the_trained_parameters(model):
    """`params` of a state are the average; a state that is restored goes on with the same bits."""
    params = random_params(model)
    optim = optim_of("temporal", ema=0.5)
    states = run(model, optim, params)
    plain = run(model, optim_of("temporal"), params)
    average = flatten_dict(params["temporal"])
    for step, (state, other) in enumerate(zip(states, plain, strict=True)):
        iterate = flatten_dict(state.opt_state.iterate["temporal"])
        expected, decay = flatten_dict(other.params["temporal"]), min(0.5, (1 + step) / (10 + step))
        for path, value in iterate.items():
            np.testing.assert_array_equal(value, expected[path])
            average[path] = decay * average[path] + (1 - decay) * value
            found = flatten_dict(state.params["temporal"])[path]
            np.testing.assert_allclose(found, average[path], rtol=0, atol=1e-6)
    assert changed(params, states[-1].params).keys() == changed(params, plain[-1].params).keys()


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("vision", "'vision' is not GROUP"),
        ("image=-1", "'image=-1' is not GROUP"),
        ("image=e", "'image=e' is not GROUP"),
        ("temporal@1", "temporal has no layers"),
        ("image@3", "image@3 names no layer, they are 0 to 2"),
        ("lora", "the model has no lora"),
        ("image=0", "nothing to train"),
        ("image,image@2=0", "after trained ones"),
    ],
)
def test_groups_that_name_nothing(model, trainable, message):
    with pytest.raises(ConfigError, match=message):
        Trainable.of(optim_of(trainable)).check(param_shapes(model))


def test_adapters_without_anything_to_adapt(model, tiny_arguments, tmp_path, capsys):
    adapted = dataclasses.replace(model, lora=LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match="leaves out the adapters"):
        Trainable.of(optim_of("temporal")).check(param_shapes(adapted))
    rank = "--config.model.lora.rank=2"
    for flags, message in (
        (("--config.model.init=",), "adapts trained towers: set --config.model.init"),
        ((f"--features={tmp_path / 'features'}",), "adapts towers, which stored features"),
    ):
        arguments = tiny_arguments(tmp_path / "run", rank, *flags)
        assert message in error_of("drl_jax.train", *arguments, capsys=capsys)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- runs and files


@pytest.fixture(scope="module")
def finished(tiny_arguments, tmp_path_factory):
    """A run with adapters and an average, what it printed, and its flags. Not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    flags = (
        *("--config.model.lora.rank=2", "--config.model.lora.targets=in_proj,c_fc"),
        *("--config.optim.ema=0.5", "--config.optim.lr=0.01"),
        "--config.train.checkpoint_every=4",
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train(tiny_arguments(workdir, *flags)) == 0
    return workdir, printed.getvalue(), flags


def test_a_run_says_what_it_trains_and_writes_its_adapter_alone(finished):
    workdir, printed, _ = finished
    (line,) = [line for line in printed.splitlines() if line.startswith("trained: ")]
    trained, total, memory = (
        float(re.search(pattern, line)[1].replace(",", ""))
        for pattern in (r"([\d,]+) of", r"of ([\d,]+)", r"optimiser ([\d.,]+) MB")
    )
    assert trained < 0.2 * total
    # Two moments and the parameters that are trained.
    assert memory == pytest.approx(3 * 4 * trained / 1e6, abs=0.01)
    assert not (workdir / "best.safetensors").exists()
    file = workdir / "adapter.safetensors"
    assert sum(array.size for array in load_file(file).values()) == trained
    assert file.stat().st_mode == (workdir / "config.json").stat().st_mode


def test_a_wrong_group_is_one_line_and_nothing_is_written(tiny_arguments, tmp_path, capsys):
    workdir = tmp_path / "run"
    arguments = tiny_arguments(workdir, "--config.optim.trainable=text,image@9=0.5")
    assert "image@9 names no layer" in error_of("drl_jax.train", *arguments, capsys=capsys)
    assert not workdir.exists()


def test_a_run_that_is_killed_goes_on_with_the_same_bits(
    finished, tiny_arguments, tmp_path, monkeypatch
):
    expected, _, flags = finished
    workdir = tmp_path / "killed"
    after_step = TrainLog.after_step

    def kill(log, step, state, scalars):
        after_step(log, step, state, scalars)
        if step == 5:
            raise MemoryError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(TrainLog, "after_step", kill)
        with pytest.raises(MemoryError):
            train(tiny_arguments(workdir, *flags))
    assert train(tiny_arguments(workdir, *flags)) == 0
    assert metrics(workdir) == metrics(expected)
    found, wanted = (load_file(run / "adapter.safetensors") for run in (workdir, expected))
    assert_same_arrays(found, wanted)


def parameters_of(run):
    config = load_config(run)
    params = restore_params(run, config.model, make_layout(), "best")[1]
    return config, jax.device_get(params)


def test_an_adapter_and_its_base_make_the_run_again(finished, tiny_weights, tmp_path, capsys):
    workdir = finished[0]
    adapter, peft = tmp_path / "adapter.safetensors", tmp_path / "peft"
    assert convert([str(workdir), str(adapter), "--adapter=drl"]) == 0
    assert_same_arrays(load_file(adapter), load_file(workdir / "adapter.safetensors"))
    assert convert([str(workdir), str(peft), "--adapter=peft"]) == 0
    config, expected = parameters_of(workdir)
    expected = flatten_dict(expected)
    assert convert([str(adapter), str(tmp_path / "copy")]) == 0
    other, found = parameters_of(tmp_path / "copy")
    assert other.model.lora == config.model.lora
    for path, leaf in flatten_dict(found).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=str(path))
    assert convert([str(peft), str(tmp_path / "from_peft"), f"--base={tiny_weights}"]) == 0
    other, found = parameters_of(tmp_path / "from_peft")
    # An adapter for each of queries, keys and values; files of PEFT have no heads.
    assert other.model.lora == dataclasses.replace(config.model.lora, rank=6, alpha=6.0)
    found, ours = (
        flatten_dict(merge_adapters(tree, config.model.lora.scale)["backbone"])
        for tree in (found, unflatten_dict(expected))
    )
    for path in found.keys() - {("logit_scale",)}:
        np.testing.assert_allclose(found[path], ours[path], rtol=0, atol=1e-6, err_msg=str(path))
    whole = tmp_path / "whole.safetensors"
    assert convert([str(workdir), str(whole)]) == 0
    for arguments, message in (
        ((adapter, tmp_path / "x", f"--base={whole}"), "is of another base than"),
        ((peft, tmp_path / "x"), "give it with --base"),
        ((tiny_weights, tmp_path / "x", f"--base={whole}"), "has none"),
        ((adapter, tmp_path / "x", "--dtype=float16"), "export a run, and"),
        ((workdir, adapter, "--adapter=drl", "--clip_only"), "are of a whole model"),
    ):
        assert message in error_of("drl_jax.convert", *map(str, arguments), capsys=capsys)
    arguments = ("--config=configs/shapes.py:smoke", f"--workdir={tmp_path / 'x'}")
    arguments += (f"--config.model.init={adapter}",)
    assert "is a LoRA adapter" in error_of("drl_jax.train", *arguments, capsys=capsys)
    said = error_of("drl_jax.weights", str(adapter), capsys=capsys)
    assert f"of rank 2, of weights with sha256 {sha256(tiny_weights)}" in said


def test_adapters_of_peft_with_an_a_for_each_product(tiny_weights, tmp_path, capsys):
    """Queries and values alone, as PEFT does by default: the changes of the kernels are theirs."""
    folder, rng, rank = tmp_path / "peft", np.random.default_rng(0), 2
    folder.mkdir()
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 3.0, "lora_dropout": 0.1}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    tensors, changes = {}, {}
    for tower, width in (("vision", 32), ("text", 16)):
        change = changes[tower] = np.zeros((width, 3 * width))
        for third, product in ((0, "q_proj"), (2, "v_proj")):
            a, b = rng.normal(size=(rank, width)), rng.normal(size=(width, rank))
            name = f"base_model.model.{tower}_model.encoder.layers.0.self_attn.{product}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            change[:, third * width : (third + 1) * width] = 1.5 * (b @ a).T
    tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    file = folder / "adapter_model.safetensors"
    save_file(tensors, file)
    assert convert([str(file), str(tmp_path / "run"), f"--base={tiny_weights}"]) == 0
    config, params = parameters_of(tmp_path / "run")
    assert config.model.lora == LoRAConfig(3 * rank, 4.5 * rank, 0.1, "in_proj")
    merged, flat = (
        flatten_dict(merge_adapters(params, config.model.lora.scale)),
        flatten_dict(params),
    )
    for above, tower in ((("backbone", "visual"), "vision"), (("backbone",), "text")):
        path = (*above, "transformer", "resblocks", "attn", "in_proj", "kernel")
        found = merged[path] - flat[path]
        np.testing.assert_allclose(found[0], changes[tower], rtol=0, atol=1e-5)
    name = "base_model.model.text_model.encoder.layers.{}.self_attn.q_proj.lora_{}.weight".format
    first, second = name(0, "A"), name(0, "B")
    nan, rest = np.full_like(tensors[first], np.nan), {**tensors}
    del rest[first]
    for fields, content, message in (
        ({"init_lora_weights": "pissa"}, tensors, "has init_lora_weights='pissa', which is not"),
        ({"fan_in_fan_out": True}, tensors, "has fan_in_fan_out=True"),
        ({"peft_type": "LOHA"}, tensors, "has peft_type='LOHA'"),
        ({"bias": "all"}, tensors, "has bias='all'"),
        ({"lora_alpha": 0}, tensors, "has r=2, lora_alpha=0 and lora_dropout=0.1; they must be"),
        ({"lora_alpha": math.nan}, tensors, "lora_alpha=nan and"),
        ({"r": 20}, tensors, "has r=20 for each of queries, keys and values, 60 in all: above"),
        ({}, {}, "has no adapters: adapter_model.safetensors has no tensors"),
        ({}, {**tensors, first: nan}, f"{first} has values that are not finite"),
        ({}, rest, "lacks lora_A of self_attn.q_proj of layer 0 of the text tower; get it again"),
        (
            {},
            {**tensors, name(9, "A"): tensors[first], name(9, "B"): tensors[second]},
            "layer 9 of",
        ),
        (
            {},
            {**tensors, first: tensors[first][:, :4].copy()},
            "layer 0 of the text tower has other",
        ),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(said | fields))
        save_file(content, file)
        arguments = (str(folder), str(tmp_path / "refused"), f"--base={tiny_weights}")
        error = error_of("drl_jax.convert", *arguments, capsys=capsys)
        assert message in error
        assert str(folder) in error
    assert not (tmp_path / "refused").exists()


def test_interpolation_from_the_start_to_the_end(
    finished, tiny_weights, tmp_path, capsys, monkeypatch
):
    workdir, whole = finished[0], tmp_path / "whole.safetensors"
    assert convert([str(workdir), str(whole)]) == 0
    start, end = load_file(tiny_weights), load_file(whole)
    for alpha in (0, 0.25, 1):
        target = tmp_path / f"mixed_{alpha}.safetensors"
        command = ["interpolate", str(tiny_weights), str(workdir), str(target)]
        assert convert([*command, f"--alpha={alpha}"]) == 0
        for name, array in load_file(target).items():
            expected = (1 - alpha) * start[name] + alpha * end[name]
            np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6, err_msg=name)
    assert evaluate([f"--workdir={workdir}", "--alphas=1,0.5", "--second=shapes"]) == 0
    (file,) = workdir.glob("alphas_test_*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["alpha"] for row in rows] == [0.0, 0.5, 1.0]
    result = json.loads((workdir / "result.json").read_text())
    assert rows[-1]["t2v_R@1"] == pytest.approx(result["test"]["t2v"]["R@1"])
    for row in rows:
        assert row["forgetting"] == rows[0]["second_t2v_R@1"] - row["t2v_R@1"]
    config, params = parameters_of(workdir)
    for name, value in (("activation", "gelu_tanh"), ("vision_heads", 16), ("family", "mine")):
        backbone = dataclasses.replace(config.model.backbone, **{name: value})
        changed = dataclasses.replace(config.model, backbone=backbone)
        both = {"a": config, "b": dataclasses.replace(config, model=changed)}
        monkeypatch.setattr(interpolation, "_whole", lambda source, of=both: (of[source], params))
        with pytest.raises(UserError, match=f"the towers differ: {name} is"):
            interpolation.interpolate("a", "b", tmp_path / "x.safetensors", 0.5)
    for alpha in (math.nan, 1.5):
        with pytest.raises(UserError, match="alpha is from 0 to 1, not"):
            interpolation.interpolate("", "", tmp_path / "x.safetensors", alpha)
    assert not (tmp_path / "x.safetensors").exists()
    arguments = ("interpolate", "a", "b", "c", "--alpha=2")
    assert "from 0 to 1" in error_of("drl_jax.convert", *arguments, capsys=capsys)


def test_towers_are_compared_as_the_start_compares_them(tiny_arguments, tiny_weights, tmp_path):
    """Of bare towers, what heads do is not forgetting."""
    towers, alone = tmp_path / "towers.safetensors", tmp_path / "alone"
    assert convert([str(tiny_weights), str(tmp_path / "run")]) == 0
    assert convert([str(tmp_path / "run"), str(towers), "--clip_only"]) == 0
    flags = (f"--config.model.init={towers}", "--config.train.epochs=0", "--config.loss.cdcr=0")
    assert train(tiny_arguments(tmp_path / "wti", *flags)) == 0
    bare = ("--config.model.interaction=dp", "--config.model.agg_module=none")
    assert train(tiny_arguments(alone, *flags, *bare)) == 0
    assert evaluate([f"--workdir={tmp_path / 'wti'}", "--alphas=1", "--second=shapes"]) == 0
    (file,) = (tmp_path / "wti").glob("alphas_test_*.json")
    result = json.loads((alone / "result.json").read_text())
    for row in json.loads(file.read_text())["rows"]:
        assert row["second_t2v_R@1"] == pytest.approx(result["test"]["t2v"]["R@1"])
        assert row["forgetting"] == 0
