"""Rerankers of the first candidates of a search."""

import copy
import dataclasses
import functools
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from support.commands import error_of, start_module, wait_for
from support.params import assert_same_arrays
from support.runs import make_run
from support.search import (
    made_up_videos,
    made_up_windows,
    random_model,
    random_reranker,
    write_index,
)

import drl_jax
from drl_jax.config import ModelConfig
from drl_jax.evaluation.evaluator import Evaluation
from drl_jax.evaluation.metrics import metrics_of, query_ranks
from drl_jax.evaluation.reranking import RerankScorer, replaced, rerank_evaluation
from drl_jax.models.reranker import (
    RerankerConfig,
    first_stage_sha256,
    reranker_definition,
    whitening,
)
from drl_jax.rerank import main as rerank
from drl_jax.runs.protocol_card import read_ranks
from drl_jax.runs.rerank_training import RerankSettings, make_step
from drl_jax.runs.reranker_file import (
    RERANKER_FILE,
    read_reranker,
    read_tensors,
    save_reranker,
    write_tensors,
)
from drl_jax.runtime.errors import Notice, UserError
from drl_jax.runtime.sharding import make_layout
from drl_jax.search.__main__ import main as search
from drl_jax.search.addresses import PageQuery
from drl_jax.search.api import SearchAPI
from drl_jax.search.filters import Filters
from drl_jax.search.query import Query
from drl_jax.search.ranking import SearchOptions

COUNT = 6
FLAGS = (f"--candidates={COUNT}", "--epochs=12")


@pytest.fixture(scope="module")
def first_stage(shapes_config, tmp_path_factory):
    """A run of a random wti with a reranker of twelve epochs, and the stored features."""
    root = tmp_path_factory.mktemp("rerank")
    make_run(root / "run", shapes_config)
    assert rerank([f"--workdir={root / 'run'}", f"--features={root / 'features'}", *FLAGS]) == 0
    return root / "run", root / "features"


@pytest.fixture(scope="module")
def model(shapes_config):
    return random_model(shapes_config, "wti")


@pytest.fixture(scope="module")
def sizes(model):
    return RerankerConfig.of(model.config.model, 4)


def some_evaluation(model, texts=12, videos=12) -> Evaluation:
    """Random texts and videos, two of which are the same, of a first stage."""
    text = model.encode_text([f"shape {n} moves" + " left" * (n % 4) for n in range(texts)])
    video = made_up_windows(model, videos)
    video = {name: np.concatenate([array[:-1], array[:1]]) for name, array in video.items()}
    sim = model.similarity(text, video)
    ranks = query_ranks(sim, np.arange(texts) % videos, np.array([[0, 1], [4, 5]]))
    return Evaluation(metrics_of(ranks), sim, ranks, text, video)


# ---------------------------------------------------------------- the order of candidates


@pytest.mark.parametrize("count", [1, 5, 12])
def test_an_untrained_reranker_keeps_everything_bit_for_bit(model, sizes, count):
    evaluation = some_evaluation(model)
    params = random_reranker(model, sizes, trained=False)
    changes = RerankScorer(sizes).changes(params, evaluation.text, evaluation.video)
    scores = evaluation.sim_matrix + changes
    found = rerank_evaluation(scores, evaluation, count, np.array([[0, 1], [4, 5]]))
    assert (found.t2v_scores == evaluation.sim_matrix).all()
    assert (found.v2t_scores == evaluation.sim_matrix).all()
    for field in dataclasses.fields(evaluation.ranks):
        one, other = (getattr(ranks, field.name) for ranks in (found.ranks, evaluation.ranks))
        assert (one == other).all(), field.name


def test_only_candidates_change_their_places():
    sim = np.array([[0.1, 0.9, 0.5, 0.7, 0.3]], np.float32)
    found = replaced(sim, np.array([[1, 3, 2]]), np.array([[-2.0, 5.0, 1.0]]))
    assert np.argsort(-found[0]).tolist() == [3, 2, 1, 4, 0]


# ---------------------------------------------------------------- the model


def test_changes_do_not_depend_on_the_batch_or_on_padding(model, sizes):
    evaluation, params = some_evaluation(model), random_reranker(model, sizes)
    scorer, text, video = RerankScorer(sizes), evaluation.text, evaluation.video
    together = scorer.changes(params, text, video)
    assert np.std(together) > 0.003
    for row in (0, 7):
        one = (
            {name: array[row : row + 1] for name, array in side.items()} for side in (text, video)
        )
        np.testing.assert_allclose(
            scorer.changes(params, *one)[0, 0], together[row, row], atol=2e-6
        )
    mask = video["frame_mask"]
    assert mask.sum(axis=1).min() < mask.shape[1]
    padded = {**video, "frame_unit": video["frame_unit"].copy()}
    padded["frame_unit"][~mask] = 9.0
    longer = {name: np.pad(a, [(0, 0), (0, 3), (0, 0)][: a.ndim]) for name, a in text.items()}
    np.testing.assert_allclose(scorer.changes(params, longer, padded), together, atol=2e-6)


def test_words_and_the_order_of_frames_count(model, sizes):
    evaluation, params = some_evaluation(model), random_reranker(model, sizes)
    scorer = RerankScorer(sizes)
    full = np.flatnonzero(evaluation.video["frame_mask"].all(axis=1))[:1]
    video = {name: array[full] for name, array in evaluation.video.items()}
    text = {name: array[:1] for name, array in evaluation.text.items()}
    expected = scorer.changes(params, text, video)[0, 0]
    backwards = {**video, "frame_unit": video["frame_unit"][:, ::-1]}
    words = {**text, "text_unit": np.roll(text["text_unit"], 1, axis=-1)}
    for given in ((text, backwards), (words, video)):
        assert abs(scorer.changes(params, *given)[0, 0] - expected) > 1e-5
    attention, added = scorer.explain(params, text, video)
    np.testing.assert_allclose(added.sum(), expected, rtol=1e-5)
    np.testing.assert_allclose(attention.sum(), 1, rtol=1e-5)
    assert not attention[~text["text_mask"][0]].any()


def test_features_are_whitened():
    features = (
        np.random.default_rng(0).normal(size=(500, 8)) @ np.diag([9, 5, 3, 1, 1, 1, 1, 1]) + 3
    )
    layer = whitening(features)
    found = features @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(found, rowvar=False), np.eye(8), atol=0.1)


def test_the_loss_is_contrastive_and_leaves_equal_captions_out(model, sizes):
    evaluation, params = some_evaluation(model), random_reranker(model, sizes)
    is_right = np.eye(12, dtype=bool)
    is_right[2, 5] = is_right[5, 2] = True
    batch = {"text": evaluation.text, "video": evaluation.video, "sim": evaluation.sim_matrix}
    tx = optax.sgd(0.0)
    before = jax.tree.map(jax.numpy.asarray, params)
    *_, loss = make_step(sizes, tx)(before, tx.init(before), {**batch, "is_right": is_right})
    scale = np.exp(params["logit_scale"])
    changes = RerankScorer(sizes).changes(params, evaluation.text, evaluation.video)
    logits = np.where(is_right & ~np.eye(12, dtype=bool), -np.inf, scale * (batch["sim"] + changes))
    lost = [jax.nn.logsumexp(logits, axis) - np.diag(logits) for axis in (0, 1)]
    np.testing.assert_allclose(loss, np.mean(lost), rtol=1e-4)


def test_training_learns_what_the_first_stage_does_not_see(model, sizes):
    """Two orders of the same frames, which wti cannot tell apart."""
    evaluation = some_evaluation(model)
    video = {name: np.repeat(a[:6], 2, axis=0) for name, a in evaluation.video.items()}
    video["frame_mask"][:] = True
    for name in ("frame_unit", "frame_weight"):
        video[name][1::2] = video[name][1::2, ::-1]
    batch = {"text": evaluation.text, "video": video, "is_right": np.eye(12, dtype=bool)}
    batch["sim"] = model.similarity(evaluation.text, video)
    np.testing.assert_allclose(batch["sim"][:, ::2], batch["sim"][:, 1::2], atol=1e-5)
    state, tx = (
        [jax.tree.map(jax.numpy.asarray, random_reranker(model, sizes, trained=False))],
        optax.adam(1e-2),
    )
    step, losses = make_step(sizes, tx), []
    state.append(tx.init(state[0]))
    for _ in range(60):
        *state, loss = step(*state, batch)
        losses.append(float(loss))
    assert losses[0] >= np.log(2)
    assert losses[-1] < 0.1


def test_a_variant_sees_less(model):
    evaluation = some_evaluation(model)
    video, sim = RerankSettings(variant="no_order").seen(evaluation.video, evaluation.sim_matrix)
    assert (video["frame_unit"][:, :1] == video["frame_unit"]).all()
    assert sim is evaluation.sim_matrix
    _, sim = RerankSettings(variant="no_prior").seen(evaluation.video, evaluation.sim_matrix)
    assert not sim.any()


def test_it_is_small_at_the_size_of_vit_b_32():
    sizes = RerankerConfig.of(ModelConfig(interaction="wti"), 12)
    _, params = reranker_definition(sizes)
    assert sum(leaf.size for leaf in flatten_dict(params).values()) <= 9e6


# ---------------------------------------------------------------- training


def test_a_killed_training_continues_bit_for_bit(first_stage, shapes_config, tmp_path):
    workdir, features = first_stage
    make_run(tmp_path / "run", shapes_config)
    arguments = (f"--workdir={tmp_path / 'run'}", f"--features={features}", *FLAGS)
    state = tmp_path / "run" / "reranker_state.safetensors"
    devices = {"JAX_NUM_CPU_DEVICES": "8"}
    process = start_module("drl_jax.rerank", *arguments, env=devices)
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    wait_for(process)
    assert not (tmp_path / "run" / RERANKER_FILE).exists()
    # In this process, which has the same number of devices as the one that was not killed.
    assert rerank(list(arguments)) == 0
    assert not state.exists()
    found, expected = (read_tensors(run / RERANKER_FILE) for run in (tmp_path / "run", workdir))
    assert_same_arrays(found[0], expected[0])
    assert found[1] == expected[1]  # Losses too, which follow from all that a state has.
    files = [(run / RERANKER_FILE).read_bytes() for run in (tmp_path / "run", workdir)]
    assert files[0] == files[1]


def test_one_and_eight_devices_agree(first_stage, shapes_config, tmp_path, monkeypatch):
    workdir, features = first_stage
    make_run(tmp_path / "run", shapes_config)
    one = make_layout(jax.devices()[:1])
    monkeypatch.setattr("drl_jax.runs.rerank_training.make_layout", lambda: one)
    arguments = [f"--workdir={tmp_path / 'run'}", f"--features={features}", *FLAGS]
    with monkeypatch.context() as patch:  # A kill after the last epoch, too, loses nothing.
        patch.setattr("drl_jax.runs.rerank_training.save_reranker", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rerank(arguments)
    assert rerank(arguments) == 0
    found, expected = (read_tensors(run / RERANKER_FILE)[1] for run in (tmp_path / "run", workdir))
    assert len(expected["losses"]) == 12
    assert expected["losses"][-1] < expected["losses"][0]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)


def test_evaluation_prints_both_stages(first_stage, capsys):
    workdir, _ = first_stage
    results = drl_jax.evaluate(workdir, rerank=COUNT)
    first, reranked = results["none"], results["rerank"]
    assert f"the first {COUNT} candidates reranked by" in reranked.card.post_processing
    assert "reranked - first" in str(reranked)
    assert "protocol" in str(reranked)
    step = first.card.step
    stored = json.loads((workdir / f"eval_test_{step}_rerank{COUNT}.json").read_text())
    assert stored["differences"]["t2v R@1"]["other"] == reranked.metrics["t2v"]["R@1"]
    ranks, card = read_ranks(workdir / f"eval_test_{step}_rerank{COUNT}.npz")
    assert card == reranked.card
    before, _ = read_ranks(workdir / f"eval_test_{step}.npz")
    # Beyond the candidates nothing changes.
    outside = before.t2v > COUNT
    assert outside.any()
    assert (ranks.t2v[outside] == before.t2v[outside]).all()
    assert (ranks.t2v[~outside] <= COUNT).all()


# ---------------------------------------------------------------- search


@pytest.fixture(scope="module")
def index(shapes_config, sizes, test_videos, tmp_path_factory):
    """An index of 32 clips, whose run has a reranker that changes the order."""
    root = tmp_path_factory.mktemp("rerank_search")
    make_run(root / "run", shapes_config)
    model = drl_jax.load(root / "run")
    params = random_reranker(model, sizes)
    about = {"first_stage": first_stage_sha256(model.params)}
    save_reranker(root / "run" / RERANKER_FILE, sizes, params, about)
    index = drl_jax.Index(root / "index", model)
    index.add(test_videos)
    return index


def test_search_reranks_the_first_videos(index, sizes, test_videos, capsys):
    sentence = "a red circle moves left"
    before = index.search(sentence, top=32)
    after = index.search(sentence, top=32, rerank=10)
    assert before.rerank_ms is None
    assert after.rerank_ms > 0
    paths = [[hit.path for hit in hits] for hits in (before, after)]
    assert paths[0][:10] != paths[1][:10]
    assert paths[0][10:] == paths[1][10:]
    assert {hit.path: hit.score for hit in before} == {hit.path: hit.score for hit in after}
    # The same as of the pairs themselves.
    file = read_reranker(
        Path(index.model.source["workdir"]) / RERANKER_FILE,
        index.model.config,
        index.model.params,
    )
    text = index.model.encode_text([sentence])
    video = index.model.encode_videos(paths[0][:10])
    changes = RerankScorer(sizes).changes(file.params, text, video)[0]
    scores = np.array([hit.score for hit in before[:10]]) + changes
    pairs = index.model.similarity(text, video)[0] + changes
    np.testing.assert_array_equal(index.model.rerank(text, video)[0], pairs)
    longer = {name: np.concatenate([array, array], axis=1) for name, array in video.items()}
    with pytest.raises(UserError, match="encode_videos"):
        index.model.rerank(text, longer)
    with pytest.raises(UserError, match="not True"):
        index.search(sentence, rerank=True)
    found = {hit.path: hit.reranked for hit in after[:10]}
    np.testing.assert_allclose([found[path] for path in paths[0][:10]], scores, atol=1e-5)
    assert (np.diff([hit.reranked for hit in after[:10]]) <= 0).all()
    assert after[10].reranked is None
    table = after.to_pandas().drop_duplicates("path")
    assert table["reranked"].notna().tolist() == 10 * [True] + 22 * [False]
    with pytest.warns(Notice, match="^only sentences are reranked$"):
        other = index.search(Query(sentence, without="a blue square"), rerank=10)
    assert other.rerank_ms is None
    # Sentences that are asked together, and some of the videos.
    together = index.search([sentence, "a blue square"], top=10, rerank=10)
    assert [hit.path for hit in together[0]] == paths[1][:10]
    only = tuple(sorted(path.name for path in paths[1][:10])[:3])
    few = index.search(sentence, top=9, filters=Filters(only=only), rerank=10)
    assert [hit.path for hit in few] == [path for path in paths[1] if path.name in only]
    explanation = after[0].moments[0].explanation.to_json()
    said = explanation["reranker"]
    assert len(said["attention"]) == len(explanation["words"])
    assert 0 < sum(said["attention"]) < 1  # The rest is on the marks of start and end.
    assert len(said["added"]) == len(explanation["times"])
    np.testing.assert_allclose(sum(said["added"]), after[0].reranked - after[0].score, atol=1e-3)
    figure = after[0].explain()
    assert f"{said['added'][0]:+.3f}" in [t.get_text() for t in figure.axes[-1].get_xticklabels()]
    assert after[10].moments[0].explanation.to_json()["reranker"] is None
    assert before[0].moments[0].explanation.to_json()["reranker"] is None


def test_the_command_and_the_api_rerank(index, capsys):
    sentence = "a red circle moves left"
    expected = [str(hit.path) for hit in index.search(sentence, top=5, rerank=10)]
    flags = ["query", f"--index={index.directory}", sentence, "--rerank=10"]
    assert search([*flags, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["rerank_ms"] > 0
    hits = answer["hits"]
    assert [hit["path"] for hit in hits] == expected
    assert search(flags) == 0
    said = capsys.readouterr().out
    assert "reranked in" in said
    assert f"(reranked: {hits[0]['reranked']:.4f})" in said
    api = SearchAPI(index, 5, 10**6)
    answer = api.search(PageQuery.of([("q", sentence), ("rerank", "10")]))
    assert [hit["reranked"] for hit in answer["hits"]] == [hit["reranked"] for hit in hits]
    assert answer["rerank_ms"] > 0
    video = answer["hits"][0]["path"]
    opened = api.video(PageQuery.of([("q", sentence), ("rerank", "10"), ("video", video)]))
    assert opened["explanation"]["reranker"]
    # A video beyond the candidates is not reranked when it is opened, either.
    given = [("q", sentence), ("rerank", "2")]
    beyond = api.search(PageQuery.of(given))["hits"][2]
    assert beyond["reranked"] is None
    opened = api.video(PageQuery.of([*given, ("video", beyond["path"])]))
    assert opened["explanation"]["reranker"] is None
    assert api.search(PageQuery.of([("q", sentence)]))["rerank_ms"] is None
    api.close()


def test_an_untrained_reranker_keeps_the_order_of_a_search(index, sizes):
    sentence, path = "a blue square", Path(index.model.source["workdir"]) / RERANKER_FILE
    trained = path.read_bytes()
    about = {"first_stage": first_stage_sha256(index.model.params)}
    save_reranker(path, sizes, random_reranker(index.model, sizes, trained=False), about)
    model = copy.copy(index.model)  # A model keeps the reranker that it has opened.
    other = drl_jax.Index(index.directory, model, SearchOptions(rerank=32))
    path.write_bytes(trained)
    # Videos may be removed while it is open.
    assert other.ranker.reranked(SimpleNamespace(count=31), None) == 31
    before, after = index.search(sentence, top=32), other.search(sentence, top=32)
    assert [hit.path for hit in after] == [hit.path for hit in before]
    assert [hit.reranked for hit in after] == [hit.score for hit in before]


# ---------------------------------------------------------------- refusals


def test_an_index_that_cannot_be_reranked_is_refused(index, tmp_path, capsys):
    flags = ["query", f"--index={index.directory}", "a circle"]
    line = error_of("drl_jax.search", *flags, "--rerank=33", capsys=capsys)
    assert "rerank=33 is above the 32 videos of the index" in line
    dp = random_model(index.model.config, "dp")
    windows = made_up_windows(dp, 2)
    windows["video_unit"] = windows["frame_unit"][:, 0]
    videos = made_up_videos(dp, ["a.mp4", "b.mp4"], windows)
    write_index(tmp_path / "dp", dp, [videos])
    with pytest.raises(UserError, match="interaction dp does not have"):
        drl_jax.Index(tmp_path / "dp", dp, SearchOptions(rerank=2))


def test_what_does_not_fit_is_refused_in_one_line(first_stage, shapes_config, tmp_path, capsys):
    workdir, features = first_stage
    evaluate = functools.partial(error_of, "drl_jax.evaluate", capsys=capsys)
    flag = f"--features={features}"
    train = functools.partial(error_of, "drl_jax.rerank", flag, capsys=capsys)
    assert "above the 32 videos of the split test" in evaluate(
        f"--workdir={workdir}", "--rerank=33"
    )
    other = tmp_path / "other"
    make_run(other, shapes_config, seed=4)
    assert "there is no" in evaluate(f"--workdir={other}", "--rerank=5")
    stored = (workdir / RERANKER_FILE).read_bytes()
    (other / RERANKER_FILE).write_bytes(stored)
    assert "is of another first stage" in evaluate(f"--workdir={other}", "--rerank=5")
    tensors, values = read_tensors(workdir / RERANKER_FILE)
    params = unflatten_dict(tensors, sep="/")
    wide = RerankerConfig(*values.pop("sizes"))._replace(width=64)
    save_reranker(other / RERANKER_FILE, wide, params, values)
    assert "has sizes [64, 4] (channels, frames)" in evaluate(f"--workdir={other}", "--rerank=5")
    for change, line in (
        ({"variant": "no_order"}, "is no complete reranker"),
        ({"first_stage": "0" * 64}, "is of another first stage"),
    ):
        tensors, values = read_tensors(workdir / RERANKER_FILE)
        write_tensors(other / RERANKER_FILE, tensors, values | change)
        assert line in evaluate(f"--workdir={other}", "--rerank=5")
    write_tensors(other / RERANKER_FILE, tensors, {})
    assert "is no complete reranker" in evaluate(f"--workdir={other}", "--rerank=5")
    (other / RERANKER_FILE).write_bytes(stored[:-8] + bytes(8))
    assert "is damaged: delete it, and run" in evaluate(f"--workdir={other}", "--rerank=5")
    assert "is of another training" in train(f"--workdir={workdir}", "--candidates=5")
    assert "above the 32 videos of val" in train(f"--workdir={workdir}", "--candidates=9999")
    make_run(tmp_path / "dp", shapes_config, "dp")
    assert "interaction dp does not have" in train(f"--workdir={tmp_path / 'dp'}")
    line = error_of("drl_jax.rerank", f"--workdir={workdir}", capsys=capsys)
    assert "--features=DIR is missing" in line
