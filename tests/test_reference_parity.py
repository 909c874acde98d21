"""Number for number with the PyTorch reference, on the goldens in DRL_GOLDEN.

Sizes, seeds and batch shapes are read from the files (`golden/README.md`).
"""

import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from drl_jax.config import ClipConfig, LossConfig, ModelConfig, OptimConfig
from drl_jax.evaluation.metrics import retrieval_metrics
from drl_jax.models.drl import init_params, model_definition
from drl_jax.models.interaction import sentence_feature
from drl_jax.models.tokenizer import tokenize
from drl_jax.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.state import TrainState
from drl_jax.training.train_step import loss_and_parts, train_step
from drl_jax.weights.load import (
    infer_clip,
    initial_params,
    params_from_state,
    state_dict_from_params,
)

GOLDEN = Path(os.environ.get("DRL_GOLDEN", Path(__file__).parent / "golden"))
SPEC = json.loads((GOLDEN / "cases.json").read_text())
CASES = sorted(SPEC["cases"])
KEY = jax.random.key(0)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def clip_state() -> dict[str, np.ndarray]:
    return {f"clip.{name}": tensor for name, tensor in load("clip").items()}


def case_state(case: dict) -> dict[str, np.ndarray]:
    """The initial parameters of a case, by the reference's names."""
    clip, heads = clip_state(), load("heads")
    state = dict(clip)
    for parameter, source in case["copied_from_clip"].items():
        state[parameter] = clip[f"clip.{source}"]
    prefix = f"arch{case['wti_arch']}."
    for name, tensor in heads.items():
        state.setdefault(name.removeprefix(prefix), tensor)
    return state


class Case:
    """A case's model on one device."""

    def __init__(self, name: str):
        spec = SPEC["cases"][name]
        self.golden = load(name)
        self.model = ModelConfig(
            clip=infer_clip(clip_state()),
            interaction=spec["interaction"],
            wti_arch=spec["wti_arch"],
            agg_module={"None": "none"}.get(spec["agg_module"], spec["agg_module"]),
            cross_dropout=0.0,
        )
        self.loss = LossConfig(
            cdcr=spec["cdcr"],
            cdcr_alpha1=spec["cdcr_alpha1"],
            cdcr_alpha2=spec["cdcr_alpha2"],
            cdcr_lambda=spec["cdcr_lambda"],
        )
        shapes = jax.eval_shape(lambda: init_params(self.model, KEY))
        # The heads' file serves all cases: take what this one's model has.
        names = state_dict_from_params(jax.tree.map(lambda x: np.zeros(x.shape), shapes))
        state = case_state(spec)
        self.initial = {name: np.asarray(state[name], np.float32) for name in names}
        self.params = params_from_state(self.initial, shapes)
        self.definition = model_definition(self.model)
        self.layout = make_layout(jax.devices()[:1])
        self.batches = load("batches")

    def batch(self, number: int) -> dict[str, np.ndarray]:
        return {
            "text_ids": self.batches["text_ids"][number].astype(np.int32),
            "text_mask": self.batches["text_mask"][number].astype(bool),
            "frames": self.batches["frames"][number],
            "frame_mask": self.batches["frame_mask"][number].astype(bool),
        }

    def step_arguments(self) -> dict:
        return {"definition": self.definition, "config": self.loss, "layout": self.layout}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return Case(request.param)


def test_the_sizes_are_inferred():
    sizes = SPEC["clip"]
    clip = infer_clip(clip_state())
    assert clip == ClipConfig(
        embed_dim=sizes["embed"],
        image_resolution=sizes["res"],
        vision_layers=sizes["vlayers"],
        vision_width=sizes["vwidth"],
        vision_heads=sizes["vwidth"] // 64,
        vision_patch_size=sizes["patch"],
        context_length=sizes["ctx"],
        vocab_size=sizes["vocab"],
        text_width=sizes["twidth"],
        text_heads=sizes["twidth"] // 64,
        text_layers=sizes["tlayers"],
    )


def test_features_and_similarities(case):
    @jax.jit
    def evaluate(params, batch):
        model = nnx.merge(case.definition, params)
        ids, mask = batch["text_ids"], batch["text_mask"]
        text_feat = model.clip.encode_text(ids)
        frame_feat = model.frame_features(batch["frames"], batch["frame_mask"])
        text = model.encode_text(ids, mask)
        video = model.encode_frames(batch["frames"], batch["frame_mask"])
        return text_feat, frame_feat, model.similarity(text, video)

    text_feat, frame_feat, sim_matrix = evaluate(case.params, case.batch(0))
    golden = case.golden
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    if golden["eval/text_feat"].ndim == 3:
        close(text_feat, golden["eval/text_feat"])
    elif golden["eval/text_feat"].ndim == 2:
        close(sentence_feature(text_feat, case.batch(0)["text_mask"]), golden["eval/text_feat"])
    if golden["eval/video_feat"].ndim:
        close(frame_feat, golden["eval/video_feat"])
    close(sim_matrix, golden["eval/t2v"])
    close(sim_matrix.T, golden["eval/v2t"])


def test_losses_and_gradients(case):
    loss_function = functools.partial(loss_and_parts, **case.step_arguments())
    grads, parts = jax.jit(jax.grad(loss_function, has_aux=True))(case.params, case.batch(0), KEY)
    golden = case.golden
    assert float(parts["contrastive_loss"]) == pytest.approx(
        float(golden["train/sim_loss"]), rel=1e-5
    )
    assert float(parts["cdcr_loss"]) == pytest.approx(
        float(golden["train/cdcr_loss"]), rel=1e-5, abs=1e-7
    )
    assert float(parts["loss"]) == pytest.approx(float(golden["train/loss"]), rel=1e-5)

    by_name = state_dict_from_params(grads)
    names = golden["grad/names"].tolist()
    # What the reference has no gradient for, the loss does not see.
    for name in set(by_name) - set(names):
        np.testing.assert_array_equal(by_name[name], 0, err_msg=name)
    found = [np.linalg.norm(by_name[name]) for name in names]
    np.testing.assert_allclose(found, golden["grad/norms"], rtol=1e-3, atol=1e-6)
    for key, expected in golden.items():
        if key.startswith("grad/full/"):
            name = key.removeprefix("grad/full/")
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                by_name[name], expected, rtol=1e-3, atol=1e-3 * scale + 1e-6, err_msg=name
            )


def test_six_optimiser_steps(case):
    optimiser = SPEC["optimiser"]
    fields = ("lr", "coef_lr", "warmup_proportion", "b1", "b2", "eps", "weight_decay")
    optim = OptimConfig(
        **{field: optimiser[field] for field in fields}, max_grad_norm=optimiser["max_grad_norm"]
    )
    tx = make_optimizer(optim, optimiser["t_total"])
    whole = case.step_arguments()["layout"].whole
    # Laid out as the step leaves it: one compilation.
    state = jax.device_put(TrainState(np.int32(0), case.params, tx.init(case.params)), whole)
    step = jax.jit(
        functools.partial(train_step, tx=tx, seed=0, **case.step_arguments()), out_shardings=whole
    )
    expected = case.golden["traj/loss_sim_cdcr_gradnorm"]
    finite = True
    for number in range(optimiser["steps"]):
        state, scalars = step(state, case.batch(number + 1))
        names = ("loss", "contrastive_loss", "cdcr_loss", "grad_norm")
        found = np.array([float(scalars[name]) for name in names])
        assert np.isfinite(found).all()
        # Where the reference turned NaN, it stays so: compare up to there.
        finite = finite and np.isfinite(expected[number]).all()
        if finite:
            np.testing.assert_allclose(found[:3], expected[number][:3], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found[3], expected[number][3], rtol=1e-3)
    if not finite:
        return
    final = state_dict_from_params(state.params)
    for name, norm in zip(case.golden["traj/names"], case.golden["traj/delta_norms"], strict=True):
        if name not in final:
            assert norm == 0, name  # the reference keeps it and never uses it
            continue
        change = np.linalg.norm(final[name] - case.initial[name])
        np.testing.assert_allclose(change, norm, rtol=1e-2, atol=1e-6, err_msg=name)
    for key, value in case.golden.items():
        if key.startswith("traj/final/"):
            name = key.removeprefix("traj/final/")
            change = np.abs(value - case.initial[name]).max()
            np.testing.assert_allclose(
                final[name], value, atol=1e-2 * change + 1e-6, rtol=1e-5, err_msg=name
            )


@pytest.mark.parametrize("name", CASES)
def test_the_heads_start_as_copies_of_the_text_tower(name):
    case = Case(name)
    started = state_dict_from_params(initial_params(case.model, clip_state(), KEY))
    sources = {name: name.removeprefix("clip.") for name in clip_state()}
    copied = SPEC["cases"][name]["copied_from_clip"]
    sources |= {name: source for name, source in copied.items() if name in started}
    assert len(sources) > len(clip_state()) or not copied or case.model.agg_module == "seqLSTM"
    for parameter, source in sources.items():
        expected = clip_state()[f"clip.{source}"].astype(np.float32)
        np.testing.assert_array_equal(started[parameter], expected, err_msg=parameter)


def test_tokenizer():
    golden = json.loads((GOLDEN / "tokenizer.json").read_text())
    ids, mask = tokenize([entry["text"] for entry in golden], len(golden[0]["ids"]))
    for row, entry in enumerate(golden):
        assert ids[row].tolist() == entry["ids"], entry["text"]
        assert mask[row].sum() == entry["length"], entry["text"]


@pytest.mark.parametrize("name", sorted(json.loads((GOLDEN / "metrics.json").read_text())))
def test_metrics(name):
    golden = json.loads((GOLDEN / "metrics.json").read_text())[name]
    sim_matrix = load("metrics")[name]
    counts = golden["captions_per_video"] or [1] * sim_matrix.shape[1]
    found = retrieval_metrics(sim_matrix, np.repeat(np.arange(len(counts)), counts))
    for direction in ("t2v", "v2t"):
        expected = golden[direction]
        for ours, theirs in (("R@1", "R1"), ("R@5", "R5"), ("R@10", "R10"), ("MnR", "MeanR")):
            assert found[direction][ours] == pytest.approx(expected[theirs], rel=1e-5)
        # torch's median of an even number of ranks is the lower of the two in the middle.
        assert 0 <= found[direction]["MdR"] - expected["MedianR"] <= 0.5
