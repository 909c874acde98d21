"""Number for number with the PyTorch reference, on the goldens in DRL_GOLDEN.

Sizes, seeds and batch shapes are read from the files (`golden/README.md`).
"""

import functools
import json

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from support.golden import GOLDEN, SPEC, case_state, clip_state, clip_weights, load

from drl_jax.config import LossConfig, ModelConfig, OptimConfig
from drl_jax.evaluation.legacy import legacy_metrics
from drl_jax.evaluation.metrics import metrics_of, query_ranks
from drl_jax.models.drl import model_definition, param_shapes
from drl_jax.models.reference_names import state_dict_from_params
from drl_jax.models.tokenizers import CLIPTokenizer
from drl_jax.runtime.sharding import make_layout
from drl_jax.training.optimizer import make_optimizer
from drl_jax.training.train_step import TrainState, apply_gradients, loss_and_parts
from drl_jax.weights.load import initial_params, params_from_state

CASES = sorted(SPEC["cases"])
# Of the trajectories, to the rounding of float32.
GRADIENT_NORM_RTOL = 1e-5


class Case:
    """The model of a case on one device, and its only program, compiled once."""

    def __init__(self, name: str):
        spec = SPEC["cases"][name]
        self.name, self.golden, self.copied = name, load(name), spec["copied_from_clip"]
        self.model = ModelConfig(
            backbone=clip_weights().description.backbone,
            interaction=spec["interaction"],
            wti_arch=spec["wti_arch"],
            agg_module={"None": "none"}.get(spec["agg_module"], spec["agg_module"]),
            cross_dropout=0.0,
        )
        fields = ("cdcr", "cdcr_alpha1", "cdcr_alpha2", "cdcr_lambda")
        loss = LossConfig(**{field: spec[field] for field in fields})
        shapes = param_shapes(self.model)
        # The file of heads serves all cases: take the parameters of this case's model.
        names = state_dict_from_params(jax.tree.map(lambda x: np.zeros(x.shape), shapes))
        state = case_state(spec)
        self.initial = {name: np.asarray(state[name], np.float32) for name in names}
        params = params_from_state(self.initial, shapes)
        layout = make_layout(jax.devices()[:1])
        self.replicated, self.batches = layout.replicated, load("batches")
        # Placed as the program returns its results.
        self.params = jax.device_put(params, self.replicated)
        definition = model_definition(self.model)
        loss_function = functools.partial(
            loss_and_parts, definition=definition, config=loss, layout=layout
        )

        def compute(params, batch):
            model = nnx.merge(definition, params)
            text_feat = model.backbone.encode_text(batch["text_ids"], batch["text_mask"])
            frame_feat = model.frame_features(batch["frames"], batch["frame_mask"])
            text = model.encode_text(batch["text_ids"], batch["text_mask"])
            video = model.encode_video(batch["frames"], batch["frame_mask"])
            features = text_feat, frame_feat, model.similarity(text, video)
            grads, parts = jax.grad(loss_function, has_aux=True)(params, batch, jax.random.key(0))
            return grads, {**parts, "grad_norm": optax.tree.norm(grads)}, features

        compute = layout.on_mesh(compute, self.model.dtype)
        self._compute = jax.jit(compute, out_shardings=self.replicated)

    def compute(self, params: dict, number: int) -> tuple[dict, dict, tuple]:
        """The gradient of the loss of a batch; the loss, its parts and the norm; features."""
        types = {"text_ids": np.int32, "text_mask": bool, "frames": np.uint8, "frame_mask": bool}
        batch = {name: self.batches[name][number].astype(types[name]) for name in types}
        return self._compute(params, batch)


case_of = functools.cache(Case)


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return case_of(request.param)


def test_features_and_similarities(case):
    _, _, (text_feat, frame_feat, sim_matrix) = case.compute(case.params, 0)
    golden = case.golden
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    if golden["eval/text_feat"].ndim == 3:
        close(text_feat.tokens, golden["eval/text_feat"])
    elif golden["eval/text_feat"].ndim == 2:
        close(text_feat.sentence, golden["eval/text_feat"])
    if golden["eval/video_feat"].ndim:
        close(frame_feat, golden["eval/video_feat"])
    close(sim_matrix, golden["eval/t2v"])
    close(sim_matrix.T, golden["eval/v2t"])


def shift_invariant_biases(case) -> list[str]:
    """Biases that the loss does not depend on: those of layers under a softmax.

    Their exact gradient is 0. The reference moves them by rounding error, which Adam amplifies.
    """
    names = ["similarity_dense.bias"]
    for side in ("text", "video"):
        biases = [n for n in case.initial if n.startswith(f"{side}_weight_fc.") and "bias" in n]
        names += sorted(biases)[-1:]
    return [name for name in names if name in case.initial]


def test_losses_and_gradients(case):
    grads, parts, _ = case.compute(case.params, 0)
    golden = case.golden
    names = {"contrastive_loss": "sim_loss", "cdcr_loss": "cdcr_loss", "loss": "loss"}
    for ours, theirs in names.items():
        expected = float(golden[f"train/{theirs}"])
        assert float(parts[ours]) == pytest.approx(expected, rel=1e-5, abs=1e-7)

    by_name = state_dict_from_params(grads)
    norms = dict(zip(golden["grad/names"].tolist(), golden["grad/norms"], strict=True))
    # Parameters without a gradient in the reference do not affect the loss.
    for name in set(by_name) - set(norms):
        np.testing.assert_array_equal(by_name[name], 0, err_msg=name)
    for name in shift_invariant_biases(case):
        np.testing.assert_array_equal(by_name[name], 0, err_msg=name)
        assert norms.pop(name) < 1e-4 * max(norms.values()), name
    found = [np.linalg.norm(by_name[name]) for name in norms]
    np.testing.assert_allclose(found, list(norms.values()), rtol=1e-3, atol=1e-6)
    for key, expected in golden.items():
        name = key.removeprefix("grad/full/")
        if key.startswith("grad/full/") and name in norms:
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                by_name[name], expected, rtol=1e-3, atol=1e-3 * scale + 1e-6, err_msg=name
            )


def rounded(params: dict, seed: int) -> dict:
    """The parameters, multiplied by about 1 + 1e-7, at random."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x * (1 + 1e-7 * rng.normal(size=x.shape)).astype("f"), params)


def optimiser_steps(case: Case, total: int, expected: np.ndarray) -> tuple[np.ndarray, dict]:
    """Steps on all batches but the first, in turn.

    Where two frames match a token equally well, or a ReLU has an input of 0, rounding chooses which
    gradient there is, and the losses of later steps differ. Such a step is repeated with parameters
    that are rounded otherwise, until the norm of its gradient is the reference's.

    Args:
      case: the model.
      total: steps that the learning rate is made for.
      expected: [N, 4], loss, contrastive loss, CDCR and gradient norm of each step.

    Returns:
      The same of the steps made, and the parameters after them.
    """
    fields = ("lr", "coef_lr", "warmup_proportion", "b1", "b2", "eps", "weight_decay")
    optim = {field: SPEC["optimiser"][field] for field in (*fields, "max_grad_norm")}
    tx = make_optimizer(OptimConfig(**optim), total)
    state = TrainState(np.int32(0), case.params, tx.init(case.params))
    state = jax.device_put(state, case.replicated)
    apply = jax.jit(functools.partial(apply_gradients, tx=tx), out_shardings=case.replicated)
    batches, found = len(case.batches["text_ids"]) - 1, []
    for number, row in enumerate(expected):
        for attempt in range(10):
            params = rounded(state.params, attempt) if attempt else state.params
            grads, parts, _ = case.compute(params, 1 + number % batches)
            norm = float(parts["grad_norm"])
            # Not finite where the reference became NaN.
            if not abs(norm - row[3]) > GRADIENT_NORM_RTOL * row[3]:
                break
        state = apply(state, grads)
        names = ("loss", "contrastive_loss", "cdcr_loss", "grad_norm")
        found.append([float(parts[name]) for name in names])
    return np.array(found), state.params


# A longer trajectory of two cases. Other goldens may lack it.
LONG = load("traj100") if (GOLDEN / "traj100.npz").exists() else {}


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in LONG}), indirect=True)
def test_a_hundred_optimiser_steps(case):
    """Losses agree to 2e-6 at every step, gradient norms to 1e-5."""
    expected = LONG[f"{case.name}/loss_sim_cdcr_gradnorm"]
    found, _ = optimiser_steps(case, len(expected), expected)
    np.testing.assert_allclose(found[:, :3], expected[:, :3], rtol=2e-6)
    np.testing.assert_allclose(found[:, 3], expected[:, 3], rtol=GRADIENT_NORM_RTOL)


def test_six_optimiser_steps(case):
    """Losses agree to 1e-4, gradient norms to 1e-3, changes of parameters to 1e-2."""
    golden = case.golden
    expected = golden["traj/loss_sim_cdcr_gradnorm"]
    found, params = optimiser_steps(case, SPEC["optimiser"]["t_total"], expected)
    assert np.isfinite(found).all()
    # Compare up to the step where the reference becomes NaN.
    finite = np.logical_and.accumulate(np.isfinite(expected).all(axis=1))
    np.testing.assert_allclose(found[finite, :3], expected[finite, :3], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[finite, 3], expected[finite, 3], rtol=1e-3)
    if not finite.all():
        return
    final = state_dict_from_params(params)
    invariant = shift_invariant_biases(case)
    norms = dict(zip(golden["traj/names"].tolist(), golden["traj/delta_norms"], strict=True))
    for name, norm in norms.items():
        if name not in final:
            assert norm == 0, name  # The reference has it and never uses it.
        elif name in invariant:
            np.testing.assert_array_equal(final[name], case.initial[name], err_msg=name)
        else:
            change = np.linalg.norm(final[name] - case.initial[name])
            np.testing.assert_allclose(change, norm, rtol=1e-2, atol=1e-6, err_msg=name)
    for key, value in golden.items():
        name = key.removeprefix("traj/final/")
        if key.startswith("traj/final/") and name not in invariant:
            change = np.abs(value - case.initial[name]).max()
            np.testing.assert_allclose(
                final[name], value, atol=1e-2 * change + 1e-6, rtol=1e-5, err_msg=name
            )


def test_initial_parameters_combine_clip_and_copies_of_its_text_tower():
    """Of the case in which both heads have copies."""
    case = case_of("xti_seqtransf")
    params = initial_params(case.model, clip_weights(), jax.random.key(0))
    started = state_dict_from_params(params)
    assert started.keys() == case.initial.keys()
    sources = {name: name.removeprefix("clip.") for name in clip_state()}
    sources |= {name: source for name, source in case.copied.items() if name in started}
    assert len(sources) > len(clip_state())
    for parameter, source in sources.items():
        expected = clip_state()[f"clip.{source}"].astype(np.float32)
        np.testing.assert_array_equal(started[parameter], expected, err_msg=parameter)


def test_tokenizer():
    golden = json.loads((GOLDEN / "tokenizer.json").read_text())
    captions = [entry["text"] for entry in golden]
    ids, mask, _ = CLIPTokenizer().tokenize(captions, len(golden[0]["ids"]))
    for row, entry in enumerate(golden):
        assert ids[row].tolist() == entry["ids"], entry["text"]
        assert mask[row].sum() == entry["length"], entry["text"]


METRICS = json.loads((GOLDEN / "metrics.json").read_text())


@pytest.mark.parametrize("name", sorted(METRICS))
def test_metrics(name):
    """The reference's own tie rule gives its numbers; so does ours, as there are no ties."""
    golden, sim_matrix = METRICS[name], load("metrics")[name]
    counts = golden["captions_per_video"] or [1] * sim_matrix.shape[1]
    text_to_video = np.repeat(np.arange(len(counts)), counts)
    legacy = legacy_metrics(sim_matrix, text_to_video)
    found = metrics_of(query_ranks(sim_matrix, text_to_video))
    for direction in ("t2v", "v2t"):
        expected = golden[direction]
        for ours, theirs in (("R@1", "R1"), ("R@5", "R5"), ("R@10", "R10"), ("MnR", "MeanR")):
            assert legacy[direction][ours] == pytest.approx(expected[theirs], rel=1e-6)
            assert found[direction][ours] == pytest.approx(expected[theirs], rel=1e-5)
        assert legacy[direction]["MdR"] == expected["MedianR"]
        # torch's median of an even number of ranks is the lower of the two in the middle.
        assert 0 <= found[direction]["MdR"] - expected["MedianR"] <= 0.5
