"""Evaluation of random parameters: blocks, padding, order of frames."""

import dataclasses

import jax
import numpy as np
import pytest
from support.params import random_params

from drl_jax.config import EvalConfig
from drl_jax.data.batches import load_split
from drl_jax.data.records import VideoDataset, dataset_dir
from drl_jax.data.splits import Captions, Split
from drl_jax.evaluation.evaluator import Evaluator, SplitError, check_split, order_by_content
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.runtime.errors import Notice
from drl_jax.runtime.sharding import make_layout


@pytest.fixture(scope="module")
def dataset(shapes_config):
    return VideoDataset(dataset_dir(shapes_config))


@pytest.fixture(scope="module")
def params(tiny_model):
    # With large positions the order of frames matters without training.
    return random_params(tiny_model, position_std=1.0)


@pytest.fixture(scope="module")
def test_split(dataset, shapes_config):
    return load_split(dataset, "test", shapes_config.data)


@pytest.fixture(scope="module")
def plain(shapes_config, dataset, params, test_split):
    return Evaluator(shapes_config, dataset, make_layout()).run(params, test_split)


def test_metrics_have_both_directions(plain, test_split):
    assert plain.sim_matrix.shape == (32, 32)
    assert set(plain.metrics) == {"t2v", "v2t", "pair_accuracy"}
    assert len(test_split.reversed_pairs) == 8


def test_block_and_batch_sizes_change_nothing(shapes_config, dataset, params, test_split, plain):
    sizes = dataclasses.replace(shapes_config.eval, batch_size=24, text_block=8)
    model = dataclasses.replace(shapes_config.model, similarity_block=7)
    config = dataclasses.replace(shapes_config, eval=sizes, model=model)
    other = Evaluator(config, dataset, make_layout()).run(params, test_split)
    np.testing.assert_allclose(other.sim_matrix, plain.sim_matrix, atol=1e-6)


@pytest.mark.parametrize("interaction", ["dp", "ti", "wti", "xti"])
def test_several_captions_of_a_video(interaction, shapes_config, dataset):
    """Each caption looks for its video, each video for its set of captions; padding never counts.

    Seven videos of one to three captions divide by no batch, block or number of devices.
    """
    train = load_split(dataset, "train", shapes_config.data)
    captions = [train.captions[video][: 1 + video % 3] for video in range(7)]
    split = Split(train.videos[:7], Captions.of(captions), np.zeros((0, 2), np.int32))
    model = dataclasses.replace(shapes_config.model, interaction=interaction)
    params = random_params(model, seed=1)

    def run(devices, **sizes):
        config = dataclasses.replace(
            shapes_config,
            model=dataclasses.replace(model, similarity_block=sizes.pop("block")),
            eval=EvalConfig(**sizes),
        )
        return Evaluator(config, dataset, make_layout(jax.devices()[:devices])).run(params, split)

    whole = run(1, batch_size=64, text_block=64, block=0)
    parts = run(8, batch_size=3, text_block=5, block=2)
    assert whole.sim_matrix.shape == (13, 7)
    np.testing.assert_allclose(parts.sim_matrix, whole.sim_matrix, atol=1e-5)

    owner = [video for video in range(7) for _ in captions[video]]
    for evaluation in (whole, parts):
        sim, metrics = evaluation.sim_matrix, evaluation.metrics
        t2v = [1 + sum(sim[text] > sim[text, owner[text]]) for text in range(13)]
        sets = np.array([[sim[np.equal(owner, s), v].max() for s in range(7)] for v in range(7)])
        v2t = [1 + sum(sets[video] > sets[video, video]) for video in range(7)]
        for ranks, found in ((t2v, metrics["t2v"]), (v2t, metrics["v2t"])):
            assert found["R@1"] == pytest.approx(100 * np.mean(np.equal(ranks, 1)))
            assert found["MnR"] == pytest.approx(np.mean(ranks))
            assert found["MdR"] == np.median(ranks)


def test_an_evaluation_has_the_rank_of_every_query(plain, test_split):
    ranks = plain.ranks
    text_to_video = test_split.caption_pairs()[0]
    np.testing.assert_array_equal(ranks.text_to_video, text_to_video)
    assert plain.metrics["t2v"]["R@1"] == pytest.approx(100 * np.mean(ranks.t2v <= 1))
    assert plain.metrics["v2t"]["MnR"] == pytest.approx(ranks.v2t.mean())
    assert plain.metrics["pair_accuracy"] == pytest.approx(100 * ranks.pair_scores.mean())
    assert len(ranks.pair_scores) == 16


@pytest.mark.parametrize(
    ("videos", "caption", "message"),
    [
        (1, "a circle", "has 1 video"),
        (3, " \n", r"has a caption without words, of the video \w+: ' \\n'"),
        (3, "&nbsp;", "has a caption without words"),
        (3, "!", None),
        (3, "a", None),
    ],
)
def test_splits_that_cannot_be_ranked(dataset, test_split, tiny_model, videos, caption, message):
    captions = [["a circle"], ["a circle", caption], ["a square"]][:videos]
    split = Split(test_split.videos[:videos], Captions.of(captions), np.zeros((0, 2), np.int32))
    arguments = ("test", split, dataset, load_tokenizer(tiny_model), 24)
    if message is None:
        check_split(*arguments)
    else:
        with pytest.raises(SplitError, match=message):
            check_split(*arguments)


def test_captions_that_evaluation_cuts_are_counted(dataset, test_split, tiny_model):
    captions = [["a circle", "a red circle"], ["a circle moves"]]
    split = Split(test_split.videos[:2], Captions.of(captions), np.zeros((0, 2), np.int32))
    with pytest.warns(
        Notice, match="^split test: 2 of 3 captions cut to data.max_words=4 tok"
    ) as said:
        check_split("test", split, dataset, load_tokenizer(tiny_model), 4)
    assert len(said) == 1


def test_pair_accuracy_is_exactly_chance_without_time(
    shapes_config, dataset, params, test_split, plain
):
    """Sorted by content, a clip and its reverse are the same input; in time they are not."""
    evaluator = Evaluator(shapes_config, dataset, make_layout())
    timeless = evaluator.run(params, test_split, frame_order=order_by_content)
    assert timeless.metrics["pair_accuracy"] == 50
    one, other = test_split.reversed_pairs.T
    sorted_gap = np.abs(timeless.sim_matrix[:, one] - timeless.sim_matrix[:, other]).max()
    timed_gap = np.abs(plain.sim_matrix[:, one] - plain.sim_matrix[:, other]).max()
    assert sorted_gap < 1e-6
    assert timed_gap > 1e-4
    reverse = evaluator.run(params, test_split, frame_order=lambda frames: frames[::-1])
    np.testing.assert_allclose(reverse.sim_matrix[:, one], plain.sim_matrix[:, other], atol=1e-6)
