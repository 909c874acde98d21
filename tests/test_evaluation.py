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
from drl_jax.evaluation.metrics import metrics_of, query_ranks
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.runtime.errors import Notice
from drl_jax.runtime.sharding import make_layout


@pytest.fixture(scope="module")
def dataset(shapes_config):
    return VideoDataset(dataset_dir(shapes_config))


@pytest.fixture(scope="module")
def test_split(dataset, shapes_config):
    return load_split(dataset, "test", shapes_config.data)


@pytest.mark.parametrize("interaction", ["wti", "xti"])
def test_sizes_of_blocks_and_batches_and_devices_change_nothing(
    interaction, shapes_config, dataset
):
    """Seven videos of one to three captions divide by none of them; padding never counts."""
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
    ranks = query_ranks(parts.sim_matrix, [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6])
    np.testing.assert_array_equal(parts.ranks.t2v, ranks.t2v)
    assert parts.metrics == metrics_of(ranks)


@pytest.mark.parametrize(
    ("videos", "caption", "message"),
    [
        (1, "a circle", "has 1 video"),
        (3, "&nbsp;", r"has a caption without words, of the video \w+: '&nbsp;'"),
        (3, "!", None),
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


def test_pair_accuracy_is_exactly_chance_without_time(shapes_config, dataset, test_split):
    """Sorted by content, a clip and its reverse are the same input; in time they are not."""
    # With large positions the order of frames matters without training.
    params = random_params(shapes_config.model, position_std=1.0)
    evaluator = Evaluator(shapes_config, dataset, make_layout())
    timed = evaluator.run(params, test_split)
    assert len(timed.ranks.pair_scores) == 16
    timeless = evaluator.run(params, test_split, frame_order=order_by_content)
    assert timeless.metrics["pair_accuracy"] == 50
    one, other = test_split.reversed_pairs.T
    assert np.abs(timeless.sim_matrix[:, one] - timeless.sim_matrix[:, other]).max() < 1e-6
    assert np.abs(timed.sim_matrix[:, one] - timed.sim_matrix[:, other]).max() > 1e-4
    reverse = evaluator.run(params, test_split, frame_order=lambda frames: frames[::-1])
    np.testing.assert_allclose(reverse.sim_matrix[:, one], timed.sim_matrix[:, other], atol=1e-6)
